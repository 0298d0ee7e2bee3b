"""Files and folders are whole or absent, on any system."""

import errno
import os
import stat

import pytest

from qlora_edu.errors import RunExistsError
from qlora_edu.files import atomic


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_gets_its_name_when_it_is_whole(tmp_path):
    with atomic.folder(tmp_path / "deep" / "made") as part:
        (part / "sub").mkdir()
        (part / "sub" / "a").write_text("1")
        assert not (tmp_path / "deep" / "made").exists()
    assert (tmp_path / "deep" / "made" / "sub" / "a").read_text() == "1"
    assert names(tmp_path / "deep") == ["made"]


def test_what_fails_half_way_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="half"), atomic.folder(tmp_path / "made") as part:
        (part / "a").write_text("1")
        raise RuntimeError("half")
    assert not names(tmp_path)


def test_what_is_whole_is_kept_if_its_name_is_taken_meanwhile(tmp_path):
    made = tmp_path / "made"
    with (
        pytest.raises(RunExistsError, match="is whole; give it a name"),
        atomic.folder(made) as part,
    ):
        (part / "a").write_text("hours of work")
        made.mkdir()
        (made / "mine").write_text("1")
    assert (part / "a").read_text() == "hours of work" and names(made) == ["mine"]


def test_a_file_is_replaced_in_one_move(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    atomic.write_text(path, "old\n")
    seen = []
    monkeypatch.setattr(atomic, "_flush", lambda part: seen.append(path.read_text()))
    atomic.write_text(path, "new")
    assert seen == ["old\n", "new"]  # when the part has been written, and after the move
    assert names(tmp_path) == ["a.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    atomic.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        atomic.write_text(path, "new \udcff")
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_text_is_utf_8_with_plain_line_ends(tmp_path):
    atomic.write_text(f"{tmp_path}/new/a.txt", "ΔW → B·A\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "ΔW → B·A\n".encode()


def test_a_file_that_may_only_be_read_is_flushed_too(tmp_path):
    with atomic.folder(tmp_path / "made") as part:
        (part / "a").write_text("1")
        (part / "a").chmod(stat.S_IRUSR)
    assert (tmp_path / "made" / "a").read_text() == "1"


def test_windows_opens_no_folder_and_flushes_nothing_that_is_open_for_reading(
    tmp_path, monkeypatch
):
    """Simulated: the two refusals of Windows."""
    writable, flushed = set(), []
    real = {name: getattr(os, name) for name in ("open", "fsync")}

    def open_(path, flags, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "no folder is opened here")
        descriptor = real["open"](path, flags, *args, **kwargs)
        (writable.add if flags & os.O_RDWR else writable.discard)(descriptor)
        return descriptor

    def fsync(descriptor):
        if descriptor not in writable:
            raise OSError(errno.EBADF, "open for reading only")
        flushed.append(descriptor)
        real["fsync"](descriptor)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fsync", fsync)
    with atomic.folder(tmp_path / "made") as part:
        (part / "a").write_text("1")
    atomic.write_text(tmp_path / "b", "2")
    assert names(tmp_path) == ["b", "made"] and len(flushed) == 2


def test_a_disk_that_cannot_keep_the_bytes_is_an_error(tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(errno.EIO, "bad disk")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="bad disk"):
        atomic.write_text(tmp_path / "a", "1")
    with pytest.raises(OSError, match="bad disk"), atomic.folder(tmp_path / "made") as part:
        (part / "a").write_text("1")
    assert not names(tmp_path)
