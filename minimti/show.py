"""What is in a file of train.py or sample.py:  python -m minimti.show m.pt

FILE is an embedding, or a result of sample.py: a video, a folder of frames, or the record beside it.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from minimti import cli
from minimti.io.files import InputError, require_file


def parse() -> argparse.Namespace:
    """The command line. Ends the program with exit code 2 where it is wrong."""
    parser = cli.Parser(prog="python -m minimti.show", description=__doc__)
    parser.add_argument(
        "file", type=cli.name, metavar="FILE", help="m.pt, m.safetensors, img_m.mp4, img_m.gif, img_m.mp4.json, ..."
    )
    return parser.parse_args()


def main() -> None:
    """Prints what is known of the file, a line each."""
    path = Path(parse().file)
    is_embedding = path.is_file() and path.suffix.lower() not in (".mp4", ".gif", ".png", ".json")
    found = about_embedding(path) if is_embedding else about_result(path)
    lines = [(cli.printable(name), cli.printable(text)) for name, text in found]
    width = max((len(name) for name, _ in lines), default=0)
    for name, text in lines:
        print(f"{name:{width}}  {text}")


def about_embedding(path: Path) -> Iterator[tuple[str, str]]:
    """Names and texts about an embedding. Raises InputError where the file is none."""
    from minimti.motion import Motion
    from minimti.results import flat, short
    from minimti.run import folder_of

    motion = Motion.load(path)
    sets, num_tokens, width = motion.tokens.shape
    frames = f"{motion.num_frames} frames" if sets == 1 else f"each of {motion.num_frames} frames, 1 over time"
    yield "embedding", f"{sets} x {num_tokens} tokens of width {width}, for {frames}"
    yield "model", motion.model
    yield "fingerprint", short(motion.fingerprint)
    planned = motion.settings.get("steps", str(motion.steps))  # 500, or 500 + 200
    yield "steps", f"{motion.unfinished}: unfinished" if motion.unfinished else planned
    yield "seed", str(motion.seed)
    yield "size", f"{motion.size[0]}x{motion.size[1]}"
    yield "fps", f"{motion.playback_fps:.4g}"
    yield from flat(vars(motion.micro))
    yield from flat({name: text for name, text in motion.settings.items() if name != "steps"})
    strip = folder_of(path) / "clip.png"
    if strip.is_file():
        yield "strip", f"{strip} (the frames that were learned)"


def about_result(path: Path) -> Iterator[tuple[str, str]]:
    """Names and texts about a result, of its own metadata or of the record beside it. Raises InputError without any."""
    from minimti.results import flat, inner_record, read_record, record_of

    suffix = path.suffix.lower()
    if suffix == ".json":
        record = read_record(path)
    elif suffix == ".mp4" and (found := inner_record(path)):
        record = found
    else:
        if not path.is_dir():
            require_file(path)
        if not path.name:  # ".", "/"
            raise InputError(f"{path}: is no result of sample.py")
        if not record_of(path).is_file():
            raise InputError(f"{path}: says nothing of how it was made, and no {record_of(path).name} is beside it")
        record = read_record(record_of(path))
    yield from flat({**record["made from"], **record["about"]})


if __name__ == "__main__":
    cli.run(main)
