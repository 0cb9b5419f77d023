"""What goes wrong with files, said in one line; and outputs that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(Exception):
    """The user's input cannot be used. The message is one line that says what is wrong and what to do."""


def existing(path: str | Path) -> Path:
    """The path of a file. Raises InputError where there is none."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    return path


def check_writable(path: str | Path) -> Path:
    """The path of a file to be. Raises InputError where none can be put: asked before hours of work, not after."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder, not a file")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: {path.parent} is no folder that can be written to")
    return path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; takes its place on success and vanishes on any failure.

    Raises InputError as `check_writable` does.
    """
    path = check_writable(path)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")  # the suffix tells PyAV the container
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
