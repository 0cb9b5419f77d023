"""Outputs that appear whole or not at all, and errors of files as one line."""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from disks import files_of_at_most

from minimti.io import files
from minimti.io.files import (
    DiskFull,
    InputError,
    atomic_write,
    check_folder,
    check_target,
    check_writable,
    make_folder,
    require_file,
)

ROOT = Path(__file__).resolve().parents[2]
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as part:
        part.write_text("first")
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic_write(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "first" and names(tmp_path) == {"a.txt"}
    for bad, message in ((tmp_path, "is a folder"), (tmp_path / "no" / "a.txt", "cannot be written")):
        with pytest.raises(InputError, match=message), atomic_write(bad):
            pass


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "target.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("target.txt")
    (tmp_path / "dangling.txt").symlink_to("new.txt")
    for link, target in (("link.txt", "target.txt"), ("dangling.txt", "new.txt")):
        with atomic_write(tmp_path / link) as part:
            part.write_text("new")
        assert (tmp_path / link).is_symlink() and (tmp_path / target).read_text() == "new"
    assert names(tmp_path) == {"target.txt", "link.txt", "dangling.txt", "new.txt"}


def test_a_name_may_be_as_long_as_a_file_can_have(tmp_path):
    for name in ("x" * 255, "x." + "y" * 253, "x" * 251 + ".txt"):
        with atomic_write(tmp_path / name) as part:
            part.write_text("whole")
    assert len(names(tmp_path)) == 3


def test_an_input_is_found_or_named(tmp_path):
    (tmp_path / "a.txt").touch()
    assert require_file(str(tmp_path / "a.txt")) == tmp_path / "a.txt"
    for path, message in (
        (tmp_path / "no.txt", "no.txt: no such file"),
        (tmp_path, "is a folder, not a file"),
        (tmp_path / "a.txt" / "b.txt", "cannot be read"),
        (tmp_path / ("x" * 300), r"cannot be read \(File name too long\)"),
        ("\0", "cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            require_file(path)


def test_an_output_is_checked_before_the_work(tmp_path):
    (tmp_path / "input.mp4").write_text("kept")
    (tmp_path / "link.mp4").symlink_to("input.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to_pipe.mp4").symlink_to("pipe")
    before = names(tmp_path)
    assert check_writable(tmp_path / "out.mp4", tmp_path / "input.mp4", "no.mp4") == tmp_path / "out.mp4"
    assert check_writable(tmp_path / ("x" * 251 + ".mp4"))
    for name, message in (
        ("", "is a folder, not a file"),
        ("pipe", "is not a regular file"),
        ("to_pipe.mp4", "is not a regular file"),
        ("/dev/null", "is not a regular file"),
        ("no/out.mp4", r"cannot be written \(No such file or directory\)"),
        ("input.mp4/out.mp4", r"cannot be written \(Not a directory\)"),
        ("x" * 256, r"cannot be written \(the name is too long\)"),
        ("ä" * 128, r"cannot be written \(the name is too long\)"),
        ("x/" * 2500 + "out.mp4", r"cannot be written \(File name too long\)"),
        ("x" * 300 + "/out.mp4", r"cannot be written \(File name too long\)"),
    ):
        with pytest.raises(InputError, match=message):
            check_writable(tmp_path / name, tmp_path / "input.mp4")
        with pytest.raises(InputError, match=message), atomic_write(tmp_path / name):
            raise AssertionError
    assert (tmp_path / "input.mp4").read_text() == "kept" and names(tmp_path) == before


def test_no_input_is_an_output_by_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model/unet").mkdir(parents=True)
    for name in ("in.png", "model/unet/a.safetensors"):
        Path(name).touch()
    Path("soft.png").symlink_to("in.png")
    os.link("in.png", "hard.png")
    Path("here").symlink_to(".")
    Path("dangling.png").symlink_to("later.png")
    for output, source in (
        ("in.png", "in.png"),
        ("model/../in.png", "in.png"),
        (tmp_path / "in.png", "in.png"),
        ("soft.png", "in.png"),
        ("in.png", "soft.png"),
        ("hard.png", "in.png"),
        ("here/in.png", "in.png"),
        ("later.png", "dangling.png"),  # neither is there, as yet
        ("here/later.png", "later.png"),
        ("model/unet/a.safetensors", "model"),
        ("here/model/unet/a.safetensors", "model"),
    ):
        for check in (check_target, check_writable):
            with pytest.raises(InputError, match="is an input; name another file for the output"):
                check(output, "other.png", source)
    assert check_writable("model/new.mp4", "model", "in.png", "", "soft.png")


def test_what_happens_on_the_way_to_the_disk(tmp_path, monkeypatch):
    """The content is on the disk before it takes the name, and the name before the function returns."""
    calls = []

    def note(function, name):
        def noting(first, *rest):
            path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
            calls.append((name, os.path.relpath(path, tmp_path)))
            return function(first, *rest)

        monkeypatch.setattr(os, name, noting)

    note(os.fsync, "fsync")
    note(os.replace, "replace")
    with atomic_write(tmp_path / "a.txt") as part:
        part.write_text("whole")
    temporary = os.path.relpath(part, tmp_path)
    assert calls == [("fsync", temporary), ("replace", temporary), ("fsync", ".")]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_a_new_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        for own in (0o600, 0o777):  # some libraries choose their own
            with atomic_write(tmp_path / "a.txt") as part:
                part.touch(own)
                part.chmod(own)
                assert stat.S_IMODE(part.parent.stat().st_mode) == 0o700 and part.parent.parent == tmp_path
            assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == mode
    finally:
        os.umask(before)


def test_processes_of_one_number_do_not_meet(tmp_path):
    """As in containers that share a folder: each of 50 files is wholly that of one of two writers; both succeed."""
    code = """if True:
        import os, sys
        os.getpid = lambda: 7
        from minimti.io.files import atomic_write
        for i in range(50):
            with atomic_write(f"{sys.argv[2]}/{i}.txt") as part:
                for _ in range(20):
                    with open(part, "a") as file:
                        file.write(sys.argv[1])
        """
    writers = [subprocess.Popen([sys.executable, "-c", code, letter, tmp_path], cwd=ROOT) for letter in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert names(tmp_path) == {f"{i}.txt" for i in range(50)}
    assert {path.read_text() for path in tmp_path.iterdir()} <= {"a" * 20, "b" * 20}


def test_a_planted_link_is_never_followed(tmp_path, monkeypatch):
    """Even if somebody guesses a name of the temporary folder, it is another one that is taken."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "m.txt").write_text("precious")
    monkeypatch.setattr("tempfile._get_candidate_names", lambda: iter(["guessed", "other"]))
    (tmp_path / ".minimti-guessed").symlink_to(victim)
    with atomic_write(tmp_path / "a.txt") as part:
        part.write_text("new")
        assert part.parent.name == ".minimti-other"
    assert (victim / "m.txt").read_text() == "precious" and names(victim) == {"m.txt"}
    assert (tmp_path / "a.txt").read_text() == "new"


def test_a_disk_without_room_is_named(tmp_path):
    (tmp_path / "a.bin").write_text("old")
    with files_of_at_most(10_000), pytest.raises(InputError) as info:
        with atomic_write(tmp_path / "a.bin") as part:
            part.write_bytes(bytes(20_000))
    message = f"{tmp_path}/a.bin: cannot be written (File too large); make room there, or name a file on another disk"
    assert str(info.value) == message
    assert (tmp_path / "a.bin").read_text() == "old" and names(tmp_path) == {"a.bin"}


@pytest.mark.parametrize("error", [RuntimeError("unexpected pos 576 vs 534"), ValueError("I/O error")])
def test_a_disk_without_room_is_named_whatever_a_library_raises(tmp_path, error):
    with files_of_at_most(10_000), pytest.raises(InputError, match="a.bin: cannot be written .File too large.; make"):
        with atomic_write(tmp_path / "a.bin"):
            raise error
    with pytest.raises(type(error)), atomic_write(tmp_path / "a.bin"):  # there is room: it is another fault
        raise error
    assert names(tmp_path) == set()


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES])
def test_a_fault_of_the_disk_at_the_end_is_named(tmp_path, monkeypatch, call, number):
    (tmp_path / "a.bin").write_text("old")
    kind = DiskFull if number in (errno.ENOSPC, errno.EDQUOT) else InputError
    with pytest.raises(kind, match=rf"a.bin: cannot be written \({os.strerror(number)}\)") as raised:
        with atomic_write(tmp_path / "a.bin") as part:
            part.write_text("new")
            monkeypatch.setattr(os, call, lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    monkeypatch.undo()
    assert raised.type == kind
    assert (tmp_path / "a.bin").read_text() == "old" and names(tmp_path) == {"a.bin"}


def test_a_full_disk(tmp_path):
    (disk := tmp_path / "disk").mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], capture_output=True)
    if done.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        for _ in range(2):
            with pytest.raises(InputError, match=r"a.bin: cannot be written \(No space left on device\); make room"):
                with atomic_write(disk / "a.bin") as part:
                    part.write_bytes(bytes(10**6))
            with pytest.raises(InputError, match="No space left on device"), atomic_write(disk / "a.bin") as part:
                part.write_bytes(bytes(120_000))
                raise RuntimeError("unexpected pos 576 vs 534")
        assert names(disk) == set()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_deleted_midway_is_one_line(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"out/a.txt: cannot be written \(No such file or directory\)"):
        with atomic_write(tmp_path / "out" / "a.txt") as part:
            part.parent.rmdir()
            (tmp_path / "out").rmdir()
            part.write_text("late")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_waits_until_the_file_is_written(tmp_path, number):
    came = []
    before = signal.signal(number, lambda *_: came.append((tmp_path / "a.txt").read_text()))
    try:
        with atomic_write(tmp_path / "a.txt") as part:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            part.write_text("whole")
            assert came == []
    finally:
        signal.signal(number, before)
    assert came == ["whole", "whole"] and names(tmp_path) == {"a.txt"}


def test_another_thread_writes_without_handlers(tmp_path):
    def write():
        with atomic_write(tmp_path / "a.txt") as part:
            part.write_text("whole")

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_what_posix_alone_has_may_be_missing(tmp_path, monkeypatch):
    """Windows opens no folder."""
    opened = os.open

    def refuse(path, flags, *args, **options):
        if path == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    with atomic_write(tmp_path / "a.txt") as part:
        part.write_text("whole")
    monkeypatch.undo()
    assert (tmp_path / "a.txt").read_text() == "whole" and names(tmp_path) == {"a.txt"}


def test_a_folder_is_made_with_its_parents(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: cannot be made a folder"):
        make_folder(tmp_path / "file")


def test_a_folder_is_checked_without_being_made(tmp_path):
    (tmp_path / "file").touch()
    check_folder(tmp_path)
    check_folder(tmp_path / "a" / "b")
    for name, message in (
        ("file/a", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("x" * 300 + "/a", "File name too long"),
        ("a/" + "x" * 300 + "/b", "File name too long"),
        ("a/" * 2500, "File name too long"),
    ):
        with pytest.raises(InputError, match=rf"cannot be made a folder \({message}\)"):
            check_folder(tmp_path / name)
    assert names(tmp_path) == {"file"} and files.MAX_NAME == 255
