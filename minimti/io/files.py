"""What goes wrong with files, said in one line; and outputs that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(Exception):
    """The user's input cannot be used. The message is one line that says what is wrong and what to do."""


def require_file(path: str | Path) -> Path:
    """The path of a file that can be read. Raises InputError where there is none."""
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
    """The path of a file to be. Raises InputError where none can be put: asked before hours of work, not after.

    A file that is an input is none to write to.
    """
    path = Path(path)
    if len(os.fsencode(path.name)) > 255:
        raise InputError(f"{path}: cannot be written (the name is too long)")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, not a file")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is no ordinary file")
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
    """Yields a path beside `path` to write to; takes its place on success and vanishes on any failure.

    A link stays one: the file it points to is replaced. Raises InputError as `check_writable` does.
    """
    target, part = _whole_and_part(check_writable(path))
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _whole_and_part(path: str | Path) -> tuple[Path, Path]:
    target = Path(os.path.realpath(path))
    return target, target.with_name(f".{os.getpid()}.part{target.suffix}")  # the suffix tells PyAV the container


def make_folder(path: str | Path) -> None:
    """Raises InputError where it is not there and cannot be made."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made a folder ({error.strerror})") from error
