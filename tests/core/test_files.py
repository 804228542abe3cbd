"""Limited reads and atomic writes, also when something goes wrong."""

import errno
import os

import mediatok as mt
import pytest
from mediatok.core.files import atomic_write, read_limited


def test_read_limited(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"12345")
    assert read_limited(path, 5) == read_limited(str(path), 6) == b"12345"
    with pytest.raises(mt.LimitExceeded, match="more than 4 bytes"):
        read_limited(path, 4)


def test_read_limited_refuses_what_is_no_file(tmp_path):
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "missing", "does not exist"),
        (tmp_path / "empty", "empty"),
        (tmp_path, "a folder"),
        (tmp_path / "pipe", "a pipe"),
        ("/dev/zero", "a pipe, socket or device"),
        (tmp_path / "empty" / "below", "cannot be read"),
        ("null\0character", "cannot be read"),
        ("x" * 5000, "cannot be read"),
    ):
        with pytest.raises(mt.InvalidInput, match=reason):
            read_limited(path, 100)


def test_messages_stay_on_one_line(tmp_path):
    with pytest.raises(mt.InvalidInput) as caught:
        read_limited(tmp_path / "two\nlines\x1b[31m", 100)
    assert str(caught.value).isprintable()


def test_atomic_write(tmp_path):
    path = tmp_path / "a.png"
    with atomic_write(path) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".png"
        assert temporary.name.startswith(".")
        temporary.write_bytes(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, mt.Cancelled, mt.InvalidInput])
def test_an_error_inside_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(error):
        fail_inside(path, error("stop"))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def fail_inside(path, error):
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"half of the n")
        raise error


def test_an_error_inside_leaves_no_new_file(tmp_path):
    with pytest.raises(mt.MediatokError, match=r"a\.bin could not be written: No space left"):
        fail_inside(tmp_path / "a.bin", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert os.listdir(tmp_path) == []


def test_disk_full_while_saving_tokens(tmp_path, make_tokens, monkeypatch):
    path = tmp_path / "a.mtok"
    make_tokens([3]).save(path)

    def fail(self, data):
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(path), "write_bytes", fail)
    with pytest.raises(mt.MediatokError, match="No space left"):
        make_tokens([5]).save(path)
    assert mt.Tokens.load(path) == make_tokens([3])
    assert os.listdir(tmp_path) == ["a.mtok"]


def test_nothing_written_inside_is_an_error(tmp_path):
    with pytest.raises(mt.MediatokError, match="could not be written"), atomic_write(tmp_path / "a.bin"):
        pass
    assert os.listdir(tmp_path) == []


def test_targets_that_cannot_be_written(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "missing" / "a.bin", "folder of .* does not exist"),
        (tmp_path, "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        ("/dev/null", "not a regular file"),
        ("null\0character", "cannot be written"),
    ):
        with pytest.raises(mt.InvalidInput, match=reason), atomic_write(path):
            pytest.fail("the block must not run")
    with pytest.raises(mt.MediatokError, match="could not be written"), atomic_write("/proc/a.bin") as temporary:
        temporary.write_bytes(b"new")  # a folder that takes no files, also for root


def test_links_are_followed(tmp_path):
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with atomic_write(tmp_path / "link") as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "target").read_bytes() == b"new"
    assert (tmp_path / "link").is_symlink()
