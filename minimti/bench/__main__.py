"""What training and sampling cost, ours / diffusers:  python -m minimti.bench"""

import json
import sys
from dataclasses import asdict

import torch

import minimti
from minimti import cli
from minimti.bench.measure import _cell, clock, cpu_cases, official_cases, prices, table
from minimti.config import MODELS
from minimti.io.files import InputError, atomic_write, check_writable


def main() -> None:
    parser = cli.Parser(prog="python -m minimti.bench", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    parser.add_argument("--only", choices=("prices", "ratios"), help="half of the work (default: both)")
    parser.add_argument("--repeats", type=cli.integer(1, 1000), default=5, help="pairs to time (default: %(default)s)")
    args = parser.parse_args()
    if args.json:
        check_writable(args.json)
    try:
        import diffusers
    except ImportError as error:
        raise InputError("diffusers, to compare with, is not installed: pip install -e '.[test]'") from error
    versions = {"minimti": minimti.__version__, "diffusers": diffusers.__version__, "torch": torch.__version__}
    hardware = f"{torch.backends.cpu.get_cpu_capability()} CPU, {torch.get_num_threads()} threads"
    device, timed = "cpu", cpu_cases
    if torch.cuda.is_available():
        hardware, device, timed = torch.cuda.get_device_name(), "cuda", official_cases

    priced = {} if args.only == "ratios" else prices(official_cases(MODELS["svd"]))
    times = {}
    for name, case in {} if args.only == "prices" else timed(MODELS["svd"]).items():
        print(f"timing {name}", file=sys.stderr)
        times[name] = t = clock(case, device, args.repeats)
        print(f"  {_cell([t['ours_s'], t['diffusers_s']], 3)} s", file=sys.stderr)
    print(f"ours / diffusers; {hardware}; " + ", ".join(map(" ".join, versions.items())))
    print(table(priced, times))
    if args.json:
        as_json = {name: asdict(a) | {"diffusers": b and asdict(b)} for name, (a, b) in priced.items()}
        report = {"prices": as_json, "ratios": times, "hardware": hardware, "versions": versions}
        with atomic_write(args.json) as part:
            part.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
