"""Files and folders that are written whole or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_edu.errors import RunExistsError


@contextmanager
def folder(path: Path | str) -> Iterator[Path]:
    """Yield a folder to write into; it becomes `path`, in one move, when all is on the disk.

    If the block raises, or the process is killed, `path` stays absent. `RunExistsError` if it is
    there already, or comes to be there meanwhile: then what was written is kept, and named.
    """
    path = Path(path)
    if path.exists():
        raise RunExistsError(f"{path} exists, and nothing is overwritten; choose another folder")
    part = _part_of(path)
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed and had this number
    part.mkdir(parents=True)
    try:
        yield part
        for inside in (*part.rglob("*"), part):
            _flush(inside)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    try:
        os.rename(part, path)
    except OSError as error:
        raise RunExistsError(f"{part} is whole; give it a name yourself ({error})") from error
    _flush(path.parent)


def write_text(path: Path | str, text: str) -> None:
    """Write a file in UTF-8 with plain line ends; what was there stays until the new one is whole.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as place:
    ...     write_text(f"{place}/greeting.txt", "hello\\n")
    ...     Path(place, "greeting.txt").read_text()
    'hello\\n'
    """
    path = Path(path)
    part = _part_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        _flush(part)
        os.replace(part, path)
        _flush(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _part_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.part-{os.getpid()}")


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk and not only in memory."""
    # Windows flushes no file that is open for reading only; it opens no folder, and needs not to.
    may_write = path.is_file() and os.access(path, os.W_OK)
    try:
        descriptor = os.open(path, os.O_RDWR if may_write else os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.EINVAL):  # "not for this kind of descriptor"
            raise
    finally:
        os.close(descriptor)
