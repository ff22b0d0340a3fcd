"""A directory that is replaced whole or not at all, whatever happens on the way.

New content is written into a hidden directory beside the target, its workshop (`.hf_prune-<digest>/new`); a lock on the
workshop shows that its owner is alive. Then target and new directory change places, in one step where the system can do
that (Linux: renameat2), else in two. If the owner is killed in between, the next save beside it repairs that.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing tells whether an owner is alive, so workshops are never cleared
    fcntl = None  # type: ignore[assignment]

WORKSHOP = ".hf_prune-"
SCRATCH = "-stream"  # ends the name of a workshop that holds what is needed until a target is written
NEW, OLD = "new", "old"
AT_FDCWD, RENAME_EXCHANGE = -100, 2
CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


# --- what may be written to ------------------------------------------------------------------------------------------


def resolved(directory: str | os.PathLike[str]) -> Path:
    """The directory that a path means, links followed, if it can be replaced as a whole.

    Raises:
        ValueError: the current directory, one that holds it, a mount point, or not a valid path.
        FileExistsError: a file, or a path below a file. PermissionError: nothing may be written beside it.
        TypeError: not a path.
    """
    target = path_of(directory)
    if Path.cwd().is_relative_to(target):
        raise ValueError(
            f"{str(directory)!r} is the current directory or holds it, and cannot be replaced as a whole. Give a "
            "directory inside it."
        )
    if os.path.ismount(target):
        raise ValueError(
            f"{str(directory)!r} is a mount point and cannot be replaced as a whole. Give a directory inside it."
        )
    there = next(path for path in (target, *target.parents) if path.exists() or path.is_symlink())
    if not there.is_dir():
        raise FileExistsError(f"{there} is a file, and a checkpoint is a directory. Choose another, or remove it.")
    home = there.parent if there == target else there
    if not os.access(home, os.W_OK):
        raise PermissionError(f"Nothing may be written in {home}, where {str(directory)!r} is made. Choose another.")
    return target


def path_of(directory: str | os.PathLike[str]) -> Path:
    """Where a path leads: `~` and links followed.

    Raises:
        ValueError: not a valid path. TypeError: not a path.
    """
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(f"A directory is a path, got {type(directory).__name__}.")
    try:
        path = Path(os.path.realpath(os.path.expanduser(directory)))
        path.exists()  # raises for names that the system does not allow
    except (ValueError, OSError) as error:
        raise ValueError(f"{os.fspath(directory)[:80]!r} cannot be a path: {error}.") from error
    return path


def refuse_full(directory: str | os.PathLike[str], overwrite: bool) -> Path:
    """The directory as `resolved` gives it, if it is empty, is not there yet, or may be replaced.

    Raises:
        FileExistsError: it is not empty. What `resolved` raises.
    """
    target = resolved(directory)
    if not overwrite and target.exists() and any(target.iterdir()):
        raise FileExistsError(
            f"{target} exists and is not empty. Choose another, or overwrite it (overwrite=True, --overwrite)."
        )
    return target


# --- writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A directory to write into, which takes the target's place at the end, or vanishes on an error.

    Args:
        target: as `resolved` gives it.

    Raises:
        FileExistsError: another process or thread is writing this directory.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    clear(target.parent)
    with _workshop(target) as workshop:
        new = workshop / NEW
        new.mkdir()
        if target.exists():
            shutil.copymode(target, new)
        yield new
        _sync(new)
        _put(new, target, workshop / OLD)


@contextlib.contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """A hidden directory beside the target for what is needed until that is written, removed at the end. What a killed
    owner leaves of it is removed by the next `scratch` or `beside` there.

    Args:
        target: as `resolved` gives it.

    Raises:
        FileExistsError: another process or thread works on this directory.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    clear(target.parent)
    with _workshop(target, SCRATCH) as workshop:
        yield workshop


def written(target: Path) -> Path:
    """The directory that `beside` yields for a target, for other processes that write into it as well."""
    return _workshop_of(target) / NEW


def carry(source: Path, target: Path, is_left: Callable[[str], bool]) -> None:
    """Hard-link into `target` what `source` holds and `target` does not, except for names that `is_left` picks."""
    for path in sorted(source.iterdir()) if source.is_dir() else ():
        if is_left(path.name) or (target / path.name).exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, target / path.name, symlinks=True, copy_function=_link)
        else:
            _link(path, target / path.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _workshop_of(target: Path, ending: str = "") -> Path:
    return target.parent / f"{WORKSHOP}{hashlib.sha256(target.name.encode()).hexdigest()[:12]}{ending}"


@contextlib.contextmanager
def _workshop(target: Path, ending: str = "") -> Iterator[Path]:
    workshop = _workshop_of(target, ending)
    lock = _open(target, workshop)
    try:
        yield workshop
    finally:
        _empty(workshop)
        _close(lock)


def _open(target: Path, workshop: Path) -> int | None:
    while True:
        try:
            workshop.mkdir()
        except FileExistsError:
            raise FileExistsError(
                f"{target} is being written by another process or thread. Wait for it, or write elsewhere. (If there "
                f"is none, remove {workshop}: this file system knows no locks.)"
            ) from None
        lock = _locked(workshop, wait=True)
        if _is_there(workshop, lock):
            return lock
        _close(lock)  # another process cleared it as abandoned before it was locked


def _is_there(workshop: Path, lock: int | None) -> bool:
    """Whether a lock is on the directory that now has the workshop's name."""
    try:
        there = workshop.stat()
    except FileNotFoundError:
        return False
    return lock is None or os.path.samestat(there, os.fstat(lock))


def _put(new: Path, target: Path, old: Path) -> None:
    """Put a finished directory under its final name; what stood there is left in the workshop."""
    if not target.exists():
        new.rename(target)
    elif not exchange(new, target):
        old.mkdir()
        target.rename(old / target.name)
        new.rename(target)
    _sync_one(target.parent)


def exchange(a: Path, b: Path) -> bool:
    """Let two paths change places in one step; False where the system cannot.

    Raises:
        OSError: it can, but not these paths.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(a), None, str(b))


def _sync(directory: Path) -> None:
    """Flush all files to disk, so that the new name never reaches it before the content."""
    for home, _, files in os.walk(directory):
        for name in files:
            path = Path(home, name)
            if not path.is_symlink():
                _sync_one(path)
        _sync_one(Path(home))


def _sync_one(path: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- after a writer was killed ---------------------------------------------------------------------------------------


def clear(parent: Path) -> None:
    """Remove the workshops whose owner is no longer alive; a directory that one had moved away is put back first."""
    for workshop in parent.glob(f"{WORKSHOP}*"):
        lock = _locked(workshop)
        if lock is not None:
            _empty(workshop)
            _close(lock)


def put_back(directory: Path) -> None:
    """Put a directory back that a killed writer had moved away in the first of the two steps of `_put`."""
    if not directory.exists() and _workshop_of(directory).is_dir():
        clear(directory.parent)


def _empty(workshop: Path) -> None:
    for old in (workshop / OLD).glob("*"):
        home = workshop.parent / old.name
        if not home.exists():  # its owner was stopped between the two steps of `_put`
            old.rename(home)
    shutil.rmtree(workshop, ignore_errors=True)


def _locked(directory: Path, wait: bool = False) -> int | None:
    """A handle that locks a directory until it is closed; None if another process has the lock, or no lock exists."""
    if fcntl is None:
        return None
    handle = None
    try:
        handle = os.open(directory, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        _close(handle)
        return None
    return handle


def _close(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)
