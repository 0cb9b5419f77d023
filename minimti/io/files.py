"""Errors of input and output files as one line each, and outputs that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(Exception):
    """The user's input cannot be used. The message is one line: what is wrong and what to do."""


def require_file(path: str | Path) -> Path:
    """The path of an existing file. Raises InputError where there is none, or it cannot be opened for reading."""
    path = Path(path)
    try:
        with open(path, "rb"):
            return path
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a folder, not a file") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from error


def check_writable(path: str | Path, *inputs: str | Path) -> Path:
    """The path of an output, to be checked before hours of work.

    Raises InputError where a file cannot be written there, and where the path is one of the `inputs`.
    """
    path = Path(path)
    if len(os.fsencode(path.name)) > 255:
        raise InputError(f"{path}: cannot be written (the name is too long)")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, not a file")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is not a regular file")
    if path.exists() and any(os.path.exists(other) and path.samefile(other) for other in inputs):
        raise InputError(f"{path}: is an input; name another file for the output")
    _, part = _whole_and_part(path)
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    return path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder to write to.

    If the block succeeds, the temporary file takes the place of `path`; if it fails, the temporary file is removed and
    `path` stays as it was. Where `path` is a link, the file that it points to is replaced. Raises InputError as
    `check_writable` does.
    """
    target, part = _whole_and_part(check_writable(path))
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _whole_and_part(path: str | Path) -> tuple[Path, Path]:
    """The file that is meant, links resolved, and its temporary file."""
    target = Path(os.path.realpath(path))
    return target, target.with_name(f".{os.getpid()}.part{target.suffix}")  # PyAV chooses the container by the suffix


def make_folder(path: str | Path) -> None:
    """Makes a folder and its parents where they do not exist. Raises InputError where that fails."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made a folder ({error.strerror})") from error


def check_folder(path: str | Path) -> None:
    """Raises InputError where a folder is not there and cannot be made. Makes none."""
    parent = Path(path).absolute()
    while not parent.exists():
        parent = parent.parent
    reason = "Not a directory" if not parent.is_dir() else "Permission denied"
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{path}: cannot be made a folder ({reason})")
