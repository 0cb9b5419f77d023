"""Errors of input and output files as one line each, and outputs that appear whole or not at all."""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minimti import signals

MAX_NAME = 255  # bytes of a file's name, on every common file system


class InputError(Exception):
    """The user's input cannot be used. The message is one line: what is wrong and what to do."""


class DiskFull(InputError):
    """There is no room for a file. The input is not at fault."""


def require_file(path: str | Path) -> Path:
    """The path of an existing file. Raises InputError where there is none, or it cannot be opened for reading."""
    path = Path(path)
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode):  # opening it would wait for a writer
            raise InputError(f"{path}: is a pipe, not a file")
        with open(path, "rb"):
            return path
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a folder, not a file") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from error


def check_target(path: str | Path, *inputs: str | Path) -> Path:
    """The path of an output, whose folder may still be missing.

    Raises InputError where the name is too long, is that of something else than a regular file, or is that of an input:
    the same file by whatever name, or an existing file in an input that is a folder.
    """
    path = Path(path)
    try:
        if len(os.fsencode(path.name)) > MAX_NAME:
            raise InputError(f"{path}: cannot be written (the name is too long)")
        if path.is_dir():
            raise InputError(f"{path}: is a folder, not a file")
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is not a regular file")
        if any(_overwrites(path, Path(other)) for other in inputs if str(other)):
            raise InputError(f"{path}: is an input; name another file for the output")
    except (OSError, ValueError) as error:
        raise unwritable(path, error) from error
    return path


def check_writable(path: str | Path, *inputs: str | Path) -> Path:
    """The path of an output, to be checked before hours of work.

    Raises InputError as `check_target` does, and where its folder is missing or takes no new file.
    """
    path = check_target(path, *inputs)
    try:
        with signals.held():
            _private_folder(path).rmdir()
    except OSError as error:
        raise unwritable(path, error) from error
    return path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path to write to. It has the suffix of `path`.

    If the block succeeds, the temporary file is synced and then takes the place of `path`: a power cut leaves the old
    file or the whole new one. If it fails, `path` stays as it was. Where `path` is a link, the file that it points to
    is replaced. Signals that stop a program wait for the end. Raises InputError as `check_writable` does, and where the
    block or the replacement fails because of the disk, for example because it is full.
    """
    with signals.held():
        check_target(path)
        target, folder = Path(os.path.realpath(path)), None
        try:
            folder = _private_folder(path)
            # One letter, for a name no longer than that of `path`; a constant one, since torch.save puts it into the
            # file. The suffix tells PyAV and Pillow which format is meant; a link's target may have another one.
            part = folder / f"m{Path(path).suffix}"
            yield part
            _permit(part)
            sync(part)
            os.replace(part, target)
            sync(target.parent)
        except Exception as error:
            # Libraries have their own exceptions for a full disk; torch.save raises a RuntimeError.
            if cause := error if isinstance(error, OSError) and error.errno else folder and _failure(folder):
                raise unwritable(path, cause) from error
            raise
        finally:
            if folder:
                shutil.rmtree(folder, ignore_errors=True)


def _private_folder(path: str | Path) -> Path:
    """A fresh folder beside the file that is meant, links resolved.

    Its name cannot be guessed and nobody else may write in it: no link can be planted there, and no process with the
    same id (as in another container) can choose the same name.
    """
    return Path(tempfile.mkdtemp(prefix=".minimti-", dir=os.path.dirname(os.path.realpath(path))))


def _permit(part: Path) -> None:
    """Gives a file the permissions of a new one, as the umask says; safetensors writes files for their owner alone."""
    fresh = part.with_name("0")
    fresh.touch()
    if part.stat().st_mode != fresh.stat().st_mode:
        part.chmod(fresh.stat().st_mode)


def sync(path: Path) -> None:
    """Waits until a file is on the disk, or the names in a folder are where the system can sync them."""
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)  # Windows syncs what may be written
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not is_folder:  # Windows does not open folders, and some network disks do not sync them
            raise


def _failure(folder: Path) -> OSError | None:
    """The OSError that writing a megabyte there raises, else None."""
    try:
        with open(folder / "1", "wb") as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def unwritable(path: str | Path, error: Exception) -> InputError:
    """What to raise where an error kept a file or folder from being written."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    kind, advice = (DiskFull, "; make room there, or name a file on another disk") if full else (InputError, "")
    return kind(f"{path}: cannot be written ({reason(error)}){advice}")


def reason(error: Exception) -> str:
    """What the system says of an error, without its number and the name of the file."""
    return getattr(error, "strerror", None) or str(error)


def _overwrites(output: Path, other: Path) -> bool:
    """Whether a file written to `output` would take the place of `other`, or of a file in it."""
    target, source = Path(os.path.realpath(output)), Path(os.path.realpath(other))
    if not (output.exists() and other.exists()):
        return target == source
    return output.samefile(other) or (other.is_dir() and target.is_relative_to(source))


def make_folder(path: str | Path) -> None:
    """Makes a folder and its parents where they do not exist. Raises InputError where that fails."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be made a folder ({reason(error)})") from error


def check_folder(path: str | Path) -> None:
    """Raises InputError where a folder is not there and cannot be made. Makes none."""
    parent, problem = Path(path).absolute(), None
    try:
        while not parent.exists():
            problem = "File name too long" if len(os.fsencode(parent.name)) > MAX_NAME else problem
            parent = parent.parent
        if not parent.is_dir():
            problem = "Not a directory"
        elif not os.access(parent, os.W_OK | os.X_OK):
            problem = "Permission denied"
    except (OSError, ValueError) as error:
        problem = reason(error)
    if problem:
        raise InputError(f"{path}: cannot be made a folder ({problem})")
