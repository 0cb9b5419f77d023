"""Outputs that appear whole or not at all, and errors of files as one line."""

import os

import pytest

from minimti.io.files import InputError, atomic_write, check_writable, make_folder, require_file


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as part:
        part.write_text("first")
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic_write(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    for bad, message in ((tmp_path, "is a folder"), (tmp_path / "no" / "a.txt", "cannot be written")):
        with pytest.raises(InputError, match=message), atomic_write(bad):
            pass


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "target.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("target.txt")
    with atomic_write(tmp_path / "link.txt") as part:
        part.write_text("new")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "target.txt").read_text() == "new"


def test_an_input_is_found_or_named(tmp_path):
    (tmp_path / "a.txt").touch()
    assert require_file(str(tmp_path / "a.txt")) == tmp_path / "a.txt"
    for path, message in (
        (tmp_path / "no.txt", "no.txt: no such file"),
        (tmp_path, "is a folder, not a file"),
        (tmp_path / "a.txt" / "b.txt", "cannot be read"),
        ("\0", "cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            require_file(path)


def test_an_output_is_checked_before_the_work(tmp_path):
    (tmp_path / "input.mp4").write_text("kept")
    (tmp_path / "link.mp4").symlink_to("input.mp4")
    os.mkfifo(tmp_path / "pipe")
    assert check_writable(tmp_path / "out.mp4", tmp_path / "input.mp4", "no.mp4") == tmp_path / "out.mp4"
    for name, message in (
        ("input.mp4", "is an input; name another file for the output"),
        ("link.mp4", "is an input"),
        ("", "is a folder, not a file"),
        ("pipe", "is not a regular file"),
        ("no/out.mp4", r"cannot be written \(No such file or directory\)"),
        ("x" * 256, r"cannot be written \(the name is too long\)"),
    ):
        with pytest.raises(InputError, match=message):
            check_writable(tmp_path / name, tmp_path / "input.mp4")
    assert (tmp_path / "input.mp4").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"input.mp4", "link.mp4", "pipe"}


def test_a_folder_is_made_with_its_parents(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: cannot be made a folder"):
        make_folder(tmp_path / "file")
