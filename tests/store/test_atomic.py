"""A folder is replaced whole: after a crash at any step, a full disk or a kill, it is the old or the new."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deltaw import store
from deltaw.errors import AdapterFileError
from deltaw.store import atomic
from tests.store.adapters import small

FORKS = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")  # Python 3.12's, for its threads
OLD, NEW = 1.0, 2.0
CALLS = ("mkdir", "open", "write", "fsync", "close", "link", "symlink", "rename", "rmdir", "unlink", "chmod", "scandir")
"""Every call of the operating system that changes a file, and some that do not."""


def value_in(folder: Path) -> float:
    """The one value of all tensors of the adapter there; fails if there are two, or none that can be read."""
    tensors = [tensor for site in store.load(folder).sites.values() for tensor in site.tensors.values()]
    values = {value for tensor in tensors for value in tensor.flatten().tolist()}
    assert len(values) == 1
    return values.pop()


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing to the disk is for a loss of power, which no test here can bring about; it is only counted."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved adapter, with files and folders of others beside its own."""
    path = tmp_path / "adapter"
    small(OLD).save(path)
    (path / "README.md").write_text("mine")
    (path / "checkpoint-5" / "deep").mkdir(parents=True)
    (path / "checkpoint-5" / "deep" / "optimizer.pt").write_bytes(b"state")
    (path / "link").symlink_to("README.md")
    return path


def assert_others_kept(folder: Path) -> None:
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "checkpoint-5" / "deep" / "optimizer.pt").read_bytes() == b"state"
    assert (folder / "link").readlink() == Path("README.md")


def assert_nothing_beside(folder: Path) -> None:
    assert list(folder.parent.iterdir()) == [folder]


def test_a_save_replaces_ours_and_keeps_the_rest(folder: Path) -> None:
    folder.chmod(0o750)
    small(NEW).save(folder)
    assert value_in(folder) == NEW
    assert folder.stat().st_mode & 0o777 == 0o750
    assert_others_kept(folder)
    assert_nothing_beside(folder)


def test_a_new_folder_and_its_parents_are_made(tmp_path: Path) -> None:
    small(NEW).save(tmp_path / "a" / "b" / "c")
    assert value_in(tmp_path / "a" / "b" / "c") == NEW


def test_an_open_file_of_another_program_stays_in_the_folder(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("w") as log:
        small(NEW).save(folder)
        log.write("still here")
    assert (folder / "metrics.jsonl").read_text() == "still here"


def test_a_link_to_a_folder_stays_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(folder)
    small(NEW).save(tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert value_in(folder) == NEW


def test_the_working_folder_can_be_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    small(NEW).save(".")
    assert Path("README.md").read_text() == "mine"
    assert value_in(Path()) == NEW


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two renames":
        without_exchange(monkeypatch)
    return str(request.param)


def counted(monkeypatch: pytest.MonkeyPatch, before: Callable[[int, str], None]) -> None:
    """Call `before` with a running number before each of the system's calls, and before an exchange."""
    count = [0]

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            before(count[0], name)
            return real(*args, **kwargs)
        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(name, getattr(os, name)))
    monkeypatch.setattr(atomic, "_exchange", wrap("exchange", atomic._exchange))


def number_of_calls(adapter_folder: Path, way: str) -> int:
    """How many calls one save makes."""
    copy = adapter_folder.parent / "copy"
    shutil.copytree(adapter_folder, copy, symlinks=True)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        if way != "exchange":
            without_exchange(patch)
        counted(patch, lambda number, name: calls.append(name))
        small(NEW).save(copy)
    shutil.rmtree(copy)
    assert {"write", "fsync", "link", "mkdir"} <= set(calls)
    return len(calls)


@FORKS
def test_a_crash_before_any_call_leaves_the_old_or_the_new(folder: Path, way: str) -> None:
    """Each crash is a process of its own that ends at once, without cleaning up."""
    seen = set()
    for stop in range(1, number_of_calls(folder, way) + 2):
        child = os.fork()
        if child == 0:
            counted(pytest.MonkeyPatch(), lambda number, name, stop=stop: os._exit(7) if number == stop else None)
            try:
                small(NEW).save(folder)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) in (0, 7)
        found = value_in(folder)
        seen.add(found)
        small(OLD).save(folder)  # recovers, and cleans up after the crash
        assert value_in(folder) == OLD
        assert_others_kept(folder)
        assert_nothing_beside(folder)
    assert seen == {OLD, NEW}


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_an_error_of_any_call_leaves_the_old_or_the_new(folder: Path, way: str, code: int) -> None:
    kept = 0
    for stop in range(1, number_of_calls(folder, way) + 1):
        with pytest.MonkeyPatch.context() as patch:
            if way != "exchange":
                without_exchange(patch)

            def fail(number: int, name: str, stop: int = stop) -> None:
                if number == stop:
                    raise OSError(code, os.strerror(code))

            counted(patch, fail)
            failed = ""
            try:
                small(NEW).save(folder)
            except AdapterFileError as error:
                failed = str(error)
        assert str(folder) in failed or not failed
        assert value_in(folder) == OLD or not failed
        kept += bool(failed)
        small(OLD).save(folder)
        assert_others_kept(folder)
        assert_nothing_beside(folder)
    assert kept > 10


@FORKS
def test_kill_at_any_moment(folder: Path) -> None:
    chance = random.Random(1)
    for _ in range(15):
        child = os.fork()
        if child == 0:
            try:
                while True:
                    for value in (NEW, OLD):
                        small(value).save(folder)
            finally:
                os._exit(1)  # only a fault gets here
        deadline = time.monotonic() + chance.random() * 0.1
        while time.monotonic() < deadline:  # readers meanwhile never see half
            assert value_in(folder) in (OLD, NEW)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert value_in(folder) in (OLD, NEW)
        assert_others_kept(folder)
    small(OLD).save(folder)
    assert_nothing_beside(folder)


def test_a_write_cut_off_between_two_renames_is_found_and_finished(folder: Path) -> None:
    aside = atomic._aside(folder)
    folder.rename(aside)
    assert value_in(folder) == OLD
    small(NEW).save(folder)
    assert value_in(folder) == NEW
    assert_others_kept(folder)
    assert_nothing_beside(folder)


def test_temporary_folders_of_living_writes_are_left_alone(folder: Path) -> None:
    mark = atomic._mark(folder)
    living, dead = (folder.parent / f"{mark}{name}.tmp" for name in ("living", "dead"))
    living.mkdir()
    dead.mkdir()
    lock = atomic._lock(living)
    small(NEW).save(folder)
    assert living.exists()
    assert not dead.exists()
    os.close(lock)


def test_a_full_disk_is_told_before_anything_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(folder)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(AdapterFileError, match=r"the disk is full: 100 bytes are free; expected \d+ bytes") as caught:
        small(NEW).save(folder)
    assert str(folder) in str(caught.value)
    monkeypatch.undo()
    assert value_in(folder) == OLD
    assert_nothing_beside(folder)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "mount") or libc.mount(b"none", os.fsencode(disk), b"tmpfs", 0, b"size=64k") != 0:
        pytest.skip("this process may not mount a disk")
    yield disk
    libc.umount(os.fsencode(disk))


def test_a_disk_that_is_really_full(tiny_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_disk / "a"
    small(OLD).save(folder)
    (tiny_disk / "ballast").write_bytes(bytes(44_000))
    roomy = shutil.disk_usage(tiny_disk)._replace(free=1 << 40)
    big = small(NEW, r=600)
    for known in (False, True):
        if known:  # as a quota would: the room only shows when it is used
            monkeypatch.setattr(shutil, "disk_usage", lambda path: roomy)
        with pytest.raises(AdapterFileError, match="disk is full"):
            big.save(folder)
        assert value_in(folder) == OLD
        assert {p.name for p in tiny_disk.iterdir()} == {"a", "ballast"}


def test_the_top_of_a_disk_cannot_be_replaced(tiny_disk: Path) -> None:
    with pytest.raises(AdapterFileError, match="mounted disk"):
        small(NEW).save(tiny_disk)
    assert list(tiny_disk.iterdir()) == []


@pytest.mark.parametrize("path", ["file", "file/inside", "x" * 300, "nul\0byte"])
def test_impossible_paths_end_in_one_clear_error(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(AdapterFileError, match="cannot be written") as caught:
        small(NEW).save(tmp_path / path)
    assert len(caught.value.faults) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_error_leaves_no_new_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(AdapterFileError, match="broken"):
        small(NEW).save(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["päth with spaces", "lora", ".hidden", "a" * 255, "'; rm -rf *", "-r"])
def test_odd_folder_names(tmp_path: Path, name: str) -> None:
    for value in (OLD, NEW):
        small(value).save(tmp_path / name)
    assert value_in(tmp_path / name) == NEW
    assert [p.name for p in tmp_path.iterdir()] == [name]
