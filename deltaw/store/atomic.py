"""Replace a folder all at once: whatever happens, the path holds the whole old folder or the whole new one.

    1. write the files into a new folder beside the target, and link the old folder's other files into it
    2. flush all to the disk
    3. exchange the two folders in one step (renameat2, Linux), and delete the old one

Where the system has no exchange, step 3 is two renames, old aside and new in. A crash between them leaves the old
folder beside the target under a name that `settled` knows, and the next read or write finds it there.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from deltaw.errors import AdapterFileError, Fault

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_CHUNK = 1 << 24


def replace_folder(path: str | Path, files: Mapping[str, bytes]) -> None:
    """Make `path` a folder with these files, keeping all other files of a folder that is already there.

    Raises `AdapterFileError`, with nothing changed, if the files cannot be written.
    """
    needed = sum(len(content) for content in files.values())
    made: list[Path] = []
    new, lock = Path(), -1
    try:
        target = Path(path).expanduser().resolve()
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file")
        made = _make_parents(target.parent)
        _restore(target)
        _check_space(target, needed)
        new = target.parent / f"{_mark(target)}{secrets.token_hex(4)}.tmp"
        new.mkdir()
        lock = _lock(new)
        _remove_leftovers(target, except_for=new)
        _fill(new, target, files)
        _swap(new, target)
    except BaseException as error:
        if new.name:
            shutil.rmtree(new, ignore_errors=True)
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, (OSError, ValueError, RuntimeError)):
            raise _fault(path, error, needed) from error
        raise
    finally:
        if lock >= 0:
            with suppress(OSError):
                os.close(lock)


def replace_text(path: Path, text: str) -> None:
    """Make a file hold this text, all at once; raises OSError, with the old file as it was."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def settled(path: Path) -> Path:
    """Where the folder of this path is now: there, or set aside if a write was cut off between its two renames."""
    path = path.expanduser().resolve()
    aside = _aside(path)
    return aside if not path.exists() and aside.is_dir() else path


def _mark(target: Path) -> str:
    """How the names of this target's temporary folders begin; short, for the target's can be as long as names go."""
    return f".deltaw-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]}-"


def _aside(target: Path) -> Path:
    return target.parent / f"{_mark(target)}old"


def _make_parents(folder: Path) -> list[Path]:
    """Make the missing folders down to this one; which were made, outermost first."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()][::-1]
    for position, parent in enumerate(missing):
        try:
            parent.mkdir()
        except FileExistsError:
            pass  # another process was quicker
        except OSError:
            for made in reversed(missing[:position]):
                with suppress(OSError):
                    made.rmdir()
            raise
    return missing


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _lock(folder: Path) -> int:
    """A lock on a folder that ends with this process, or -1 where folders cannot be locked."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return -1
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return -1
    return descriptor


def _remove_leftovers(target: Path, *, except_for: Path) -> None:
    """Delete temporary folders of writes that died; those of living writes are locked."""
    for folder in target.parent.glob(f"{_mark(target)}*.tmp"):
        if folder != except_for:
            lock = _lock(folder)
            if lock >= 0:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _fill(new: Path, old: Path, files: Mapping[str, bytes]) -> None:
    """Write the files and link what else the old folder holds, and flush it all to the disk."""
    for name, content in files.items():
        _write(new / name, content)
    if old.is_dir():
        _link_all(old, new, except_for=tuple(files))
        shutil.copymode(old, new)
    _flush(new)


def _write(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view[:_CHUNK]):]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link_all(old: Path, new: Path, *, except_for: Sequence[str] = ()) -> None:
    """Give all files of a folder a second name in another one; copies, where the system has no links."""
    with os.scandir(old) as entries:
        for entry in entries:
            to = new / entry.name
            if entry.name in except_for:
                continue
            if entry.is_dir(follow_symlinks=False):
                to.mkdir(exist_ok=True)
                _link_all(Path(entry.path), to)
                shutil.copymode(entry.path, to)
                _flush(to)
            elif os.path.lexists(to):
                continue
            elif entry.is_symlink():
                to.symlink_to(Path(entry.path).readlink())
            else:
                try:
                    os.link(entry.path, to)
                except OSError as error:
                    if error.errno in _NO_SPACE:
                        raise
                    shutil.copy2(entry.path, to)


def _flush(folder: Path) -> None:
    """Make a folder's list of names lasting; some systems cannot, and need not."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(new: Path, target: Path) -> None:
    """Put the new folder in the target's place and delete the old one."""
    if not target.exists():
        new.rename(target)
        _flush(target.parent)
        return
    here = _working_folder_in(target)
    if _exchange(new, target):
        old = new
    else:
        old = _aside(target)
        target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            old.rename(target)
            raise
    # From here on the new folder is in place: what fails now must not undo it.
    with suppress(OSError):
        if here:
            os.chdir(here)  # the same path, which is now in the new folder
        _flush(target.parent)
        _link_all(old, target)  # files that appeared in the old folder after its files were linked
    shutil.rmtree(old, ignore_errors=True)


def _working_folder_in(target: Path) -> Path | None:
    """This process's working folder, if it lies in the target and would be deleted with the old one."""
    try:
        here = Path.cwd()
    except OSError:
        return None
    return here if here.is_relative_to(target) else None


def _restore(target: Path) -> None:
    """Finish what a write that died between two renames left undone."""
    aside = _aside(target)
    if aside.is_dir():
        if target.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(target)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where the system or the disk cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    done = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _fault(path: str | Path, error: Exception, needed: int) -> AdapterFileError:
    """What to tell about a write that failed."""
    code = error.errno if isinstance(error, OSError) else None
    if code in _NO_SPACE:
        folder = next(p for p in Path(path).expanduser().absolute().parents if p.exists())
        return AdapterFileError(Fault(str(path), f"the disk is full: {shutil.disk_usage(folder).free} bytes are free",
                                      f"{needed} bytes", "Free some space or save elsewhere; nothing was changed"))
    why = (isinstance(error, OSError) and error.strerror) or str(error)
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        expected, remedy = "a writable folder in a writable folder", "Save to a path whose parent you may write to"
    elif code in (errno.EBUSY, errno.EXDEV):
        expected, remedy = "a folder that can be replaced as a whole", "Save to a folder inside this mounted disk"
    else:
        expected, remedy = "", "Nothing was changed; save to another path"
    return AdapterFileError(Fault(repr(str(path)), f"cannot be written ({why})", expected, remedy))
