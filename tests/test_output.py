"""What the programs print, to whom, and where their results go."""

import argparse
import errno
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

import sample
from minimti import cli
from minimti.budget import Budget
from minimti.io.files import DiskFull, InputError

ROOT = Path(__file__).resolve().parents[1]
# A program that reports each of its results when it has written it.
RESULTS = """if True:
    import sys
    from pathlib import Path
    from minimti import cli
    def main():
        for i in range(3):
            Path(sys.argv[1], f"{i}.txt").write_text("whole")
            print("result", i, "x" * 100_000)
            print("progress", file=sys.stderr, flush=True)
    cli.run(main)
    """


def run(code: str, *args: str | Path, shell: str = '"$@"', **options) -> subprocess.CompletedProcess:
    """Runs Python code within a line of bash."""
    command = ["bash", "-c", f"set -o pipefail; {shell}", "bash", sys.executable, "-c", code, *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, **options)


@pytest.mark.parametrize(
    "shell",
    [
        '"$@" | true',
        '"$@" | head -c 5',
        '"$@" 2>&1 | true',
        '"$@" >&-',
        '"$@" 2>&-',
        '"$@" >&- 2>&-',
        '"$@" > /dev/full',
        '"$@" 2> /dev/full',
    ],
)
def test_a_closed_pipe_does_not_stop_the_results(tmp_path, shell):
    done = run(RESULTS, tmp_path, shell=shell)
    assert done.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.txt", "1.txt", "2.txt"]
    assert done.stderr in (b"", b"progress\n" * 3)


def test_help_may_be_cut_off():
    code = (
        "import sample; from minimti import cli; import sys; sys.argv = ['sample.py', '--help']; cli.run(sample.main)"
    )
    done = run(code, shell='"$@" | head -n 1')
    assert done.returncode == 0 and done.stdout.startswith(b"usage: sample.py") and done.stderr == b""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_any_name_can_be_printed(encoding):
    code = r"""if True:
        import os, sys
        from minimti import cli
        def main():
            for text in (os.fsdecode(b"\xff.mp4"), "日.mp4", "ä.mp4"):
                print(text)
                print(text, file=sys.stderr)
        cli.run(main)
        """
    done = run(code, env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"})
    lines = done.stdout.decode(encoding).splitlines()
    assert done.returncode == 0 and lines[0] == r"\udcff.mp4"
    assert lines[1] == ("日.mp4" if encoding == "utf-8" else r"\u65e5.mp4")
    assert lines[2] == (r"\xe4.mp4" if encoding == "ascii" else "ä.mp4")
    assert done.stderr.count(b"\n") == 3


def test_names_are_escaped():
    assert cli.printable("plain name ä 日.mp4") == "plain name ä 日.mp4"
    assert cli.printable(os.fsdecode(b"a\xffb")) == r"a\udcffb"
    assert cli.printable(Path("a\nb\r\t\x1b[31m\u2028")) == r"a\nb\r\t\x1b[31m\u2028"


@pytest.mark.parametrize("name", ["a\nb.png", "a\x1b[31mb.png", os.fsdecode(b"\xff\xfe.png"), "a\u2028b.png", "\r.png"])
def test_an_error_is_one_line_whatever_the_name(name, capsys):
    def fail():
        raise InputError(f"{name}: no such file")

    def misuse():
        cli.Parser("sample.py", None).parse_args([f"--{name}"])

    for main in (fail, misuse):
        with pytest.raises(SystemExit) as stop:
            cli.run(main)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and len(error.splitlines()) == 1 and error[:-1].isprintable() and error[-1] == "\n"


@pytest.mark.parametrize(
    "error, code", [(OSError("disk"), 1), (OSError(), 1), (FloatingPointError("step 3"), 1), (InputError(""), 2)]
)
def test_a_failure_is_one_line(error, code, capsys):
    def fail():
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.run(fail)
    assert stop.value.code == code and capsys.readouterr().err.count("\n") == 1


ON_A_CARD = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee the documentation")
ON_A_CPU = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: {}: you tried to allocate 8 bytes."


@pytest.mark.parametrize(
    "error",
    [
        ON_A_CARD,
        RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GiB)."),
        RuntimeError(ON_A_CPU.format("can't allocate memory")),
        RuntimeError(ON_A_CPU.format("not enough memory")),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=lambda error: str(error)[:12],
)
@pytest.mark.parametrize(
    "program, mode, advice",
    [
        ("train.py", None, "--memory low or a smaller --size or fewer --frames"),
        ("train.py", "max", "--memory fast or a smaller --size or fewer --frames"),
        ("train.py", "balanced", "--memory low or a smaller --size or fewer --frames"),
        ("train.py", "low", "a smaller --size or fewer --frames"),
        ("sample.py", "fast", "--memory balanced or a smaller --size"),
        ("score.py", "fast", "--memory balanced"),
        ("score.py", "low", "--device cpu"),
        ("pretrain/__main__.py", None, "a smaller --batch"),
        ("evaluate/__main__.py", None, "fewer --jobs"),
    ],
)
def test_out_of_memory_is_one_line_that_names_the_next_smaller_setting(
    mini_svd, monkeypatch, capsys, error, program, mode, advice
):
    def fail():
        raise error

    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(mini_svd, "budget", mode and Budget(memory=mode))
    monkeypatch.setattr(cli, "_loaded", [weakref.ref(mini_svd)] if mode else [])
    with pytest.raises(SystemExit) as stop:
        cli.run(fail)
    line = capsys.readouterr().err
    assert stop.value.code == 1 and line.count("\n") == 1
    program = program.removesuffix("/__main__.py")
    assert line.startswith(f"{program}: error: out of memory: try {advice} ({str(error)[:20] or 'MemoryError'}")


@pytest.mark.full
@pytest.mark.parametrize(
    "memory, advice", [("balanced", "--memory low or a smaller --size"), ("low", "a smaller --size")]
)
def test_memory_that_runs_out_at_work_is_one_line(tmp_path, memory, advice):
    """That of the process: its address space ends 128 MiB further on once the model is there."""
    code = """if True:
        import resource, sys
        import sample
        from minimti import cli
        load_model = cli.load_model
        def limited(*args, **options):
            svd = load_model(*args, **options)
            used = 1024 * int(open("/proc/self/status").read().split("VmSize:")[1].split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**27,) * 2)
            return svd
        cli.load_model = limited
        sys.argv = ["sample.py", "examples/rocket.png", *sys.argv[1:]]
        cli.run(sample.main)
        """
    done = run(code, "--model", "tiny", "--size", "2048x1024", "--memory", memory, "--out", tmp_path / "x.mp4")
    assert done.returncode == 1 and b"Traceback" not in done.stderr, done.stderr
    line = done.stderr.decode().splitlines()[-1]
    assert line.startswith(f"sample.py: error: out of memory: try {advice} (")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error, code", [(InputError("x"), 2), (DiskFull("x"), 1), (OSError("x"), 1)], ids=repr)
def test_what_is_no_fault_of_the_input_exits_with_1(monkeypatch, capsys, error, code):
    def fail():
        raise error

    monkeypatch.setattr(sys, "argv", ["sample.py"])
    with pytest.raises(SystemExit) as stop:
        cli.run(fail)
    assert stop.value.code == code and capsys.readouterr().err == "sample.py: error: x\n"


def test_another_fault_keeps_its_traceback():
    def fail():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        cli.run(fail)


def outputs(images: list[str], out: str = ".", emb: str | None = None, model: str | None = None) -> list[Path]:
    """The results of a command, whose motion is called m where there is no embedding."""
    others = {
        "swap": None,
        "format": None,
        "seed": 0,
        "seeds": 1,
        "compare": False,
        "attention": False,
        "unconditional": False,
    }
    args = argparse.Namespace(images=images, out=out, emb=[emb] if emb else [], model=model, **others)
    return [job.path for job in sample.outputs(args, "m")]


def test_no_result_takes_the_place_of_an_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b_emb.mp4", "in.mp4", "model.mp4", "emb.mp4"):  # a name is no promise of what is in a file
        Path(name).touch()
    os.link("in.mp4", "hard.mp4")
    Path("soft.mp4").symlink_to("model.mp4")
    Path("folder").mkdir()
    Path("folder/a_emb.mp4").symlink_to("../emb.mp4")
    inputs = {"emb": "emb.mp4", "model": "model.mp4"}
    for images, out in (
        (["in.mp4"], "in.mp4"),
        (["in.mp4"], "hard.mp4"),
        (["a.png"], "emb.mp4"),
        (["a.png"], "soft.mp4"),
        (["a.png"], "model.mp4"),
        (["a.png"], "folder"),  # a_emb.mp4 there
        (["b.png", "b_emb.mp4"], "."),  # a later input
    ):
        with pytest.raises(InputError, match="is an input; name another file for the output"):
            outputs(images, out, **inputs)
    assert outputs(["a.png", "in.mp4"], "new", **inputs) == [Path("new/a_emb.mp4"), Path("new/in_emb.mp4")]


def test_results_whose_names_cannot_be_are_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in_m.mp4").mkdir()
    os.mkfifo("pipe_m.mp4")
    for image, out, message in (
        ("x" * 250 + ".png", ".", r"\(the name is too long\)"),
        ("x" * 250 + ".png", "new", r"\(the name is too long\)"),
        ("a.png", "x" * 300, r"\(File name too long\)"),
        ("a.png", "x/" * 3000, r"\(File name too long\)"),
        ("a.png", "x" * 300 + ".mp4", r"\(the name is too long\)"),
        ("in.png", ".", "is a folder, not a file"),
        ("pipe.png", ".", "is not a regular file"),
    ):
        with pytest.raises(InputError, match=message):
            outputs([image], out)
