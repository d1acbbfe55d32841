"""The folder that compiled kernels are kept in: where it is, and how its files are made, locked,
checked and opened.

Every file has a folder of its own, which appears under its name when all of it is on the disk. The
file `done` beside it records its SHA-256, size and name, and what is opened is compared with that:
a file that was cut or changed would end the process that runs it.
"""

import contextlib
import hashlib
import logging
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

from adaptive_longformer.attention.kernels.trust import (
    UntrustedError,
    check_folder,
    check_path,
    open_trusted,
)
from adaptive_longformer.unfinished import taken_back_if_interrupted

logger = logging.getLogger(__name__)

# Seconds that a process waits for another one, and after how many of them it says so.
LOCK_TIMEOUT = 300.0
LOCK_PATIENCE = 5.0
_DONE = "done"
_RECORD = re.compile(rb"([0-9a-f]{64}) (\d{1,15}) (\w[\w.-]{0,99})\n")
_LONGEST_RECORD = 200
_REMEDY = "ADAPTIVE_LONGFORMER_CACHE names a folder that {}"


class KernelsUnavailableError(RuntimeError):
    """The compiled kernels cannot be used here; the message says why."""


class CachedFile(NamedTuple):
    """A file of the cache that was opened and checked.

    Attributes:
        path: where it lies.
        file: the opened file, which nobody can exchange.
        sha256: what was recorded, and what it has.
    """

    path: Path
    file: BinaryIO
    sha256: str

    def why_trusted(self) -> str:
        """The file and what was checked of it."""
        status = os.fstat(self.file.fileno())
        return (
            f"{self.path}: owner {status.st_uid}, mode {status.st_mode & 0o7777:o}, "
            f"{status.st_size} bytes and SHA-256 {self.sha256[:12]} as recorded, closed to others "
            "up to the root"
        )


def cache_folder() -> Path:
    """The folder of all builds, without links; ADAPTIVE_LONGFORMER_CACHE names another one.

    Raises:
        KernelsUnavailableError: none is named, and this user has no home.
    """
    if not (cache := os.environ.get("ADAPTIVE_LONGFORMER_CACHE")):
        try:
            base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        except RuntimeError as error:
            raise KernelsUnavailableError(f"{error}; {_REMEDY.format('can be written')}") from error
        cache = Path(base) / "adaptive_longformer"
    with named_os_errors():
        return Path(os.path.realpath(cache))


def kernels_mode() -> str:
    """What ADAPTIVE_LONGFORMER_KERNELS allows: "on" or "cached".

    Raises:
        KernelsUnavailableError: it is "off", or a word without a meaning.
    """
    mode = os.environ.get("ADAPTIVE_LONGFORMER_KERNELS", "on")
    if mode == "off":
        raise KernelsUnavailableError("ADAPTIVE_LONGFORMER_KERNELS is 'off'")
    if mode not in ("on", "cached"):
        raise KernelsUnavailableError(
            f"ADAPTIVE_LONGFORMER_KERNELS is {mode!r}, 'on', 'cached' or 'off' is allowed"
        )
    return mode


def find(folder: Path) -> CachedFile | str:
    """The file of a folder of the cache, opened; or why there is none that may be used: it is not
    built yet, it is damaged, or it could be from others.

    Raises:
        KernelsUnavailableError: others could change the cache, or it cannot be read.
    """
    missing = f"{folder} holds no finished build"
    with named_os_errors():
        if not folder.parent.exists():
            return missing
        _check_cache(folder.parent)
    try:
        check_path(folder)
        with open_trusted(folder / _DONE) as file:
            record = _RECORD.fullmatch(file.read(_LONGEST_RECORD))
    except FileNotFoundError:
        return missing
    except (OSError, UntrustedError) as error:
        return str(error)
    if record is None:
        return f"{folder / _DONE} is damaged"
    sha256, size, name = (group.decode() for group in record.groups())
    path = folder / name
    try:
        file = open_trusted(path)
    except (OSError, UntrustedError) as error:
        return str(error)
    is_whole = os.fstat(file.fileno()).st_size == int(size)
    if is_whole and hashlib.sha256(file.read()).hexdigest() == sha256:
        file.seek(0)
        return CachedFile(path, file, sha256)
    file.close()
    return f"{path} is damaged: it is not what was built"


def why_not_cached(folder: Path) -> str | None:
    """None if `find` finds a file, else its reason."""
    found = find(folder)
    if isinstance(found, str):
        return found
    found.file.close()
    return None


def find_or_make(folder: Path, make: Callable[[Path], str]) -> CachedFile:
    """The file of a folder of the cache, made now if there is none that may be used.

    Args:
        folder: its name stands for all that the file depends on.
        make: makes the file in an empty folder and returns its name.

    Raises:
        KernelsUnavailableError: it cannot be made, or not be kept safely; with the reason.
    """
    found = find(folder)
    if isinstance(found, CachedFile):
        return found
    if kernels_mode() == "cached":
        raise KernelsUnavailableError(f"ADAPTIVE_LONGFORMER_KERNELS is 'cached' and {found}")
    with named_os_errors():
        # Unlike those of mkdir, parents are closed to others too.
        for path in reversed([folder.parent, *folder.parent.parents]):
            if not path.exists():
                path.mkdir(mode=0o700, exist_ok=True)
        _check_cache(folder.parent)
        with locked(folder) as is_locked:
            # Another process may have made it while this one waited.
            found = find(folder)
            if isinstance(found, CachedFile):
                return found
            if folder.exists():
                logger.warning("%s; it is built anew", found)
            prefix = f"{folder.name}.unfinished-"
            if is_locked:
                _discard(folder.parent, prefix)  # what killed builders left
            unfinished = folder.with_name(f"{prefix}{secrets.token_hex(4)}")
            discard = partial(_discard, folder.parent, unfinished.name)
            with taken_back_if_interrupted(discard):
                try:
                    unfinished.mkdir(mode=0o700)
                    return _make(folder, unfinished, make)
                finally:
                    discard()


def _discard(parent: Path, prefix: str) -> None:
    for path in parent.glob(f"{prefix}*"):
        shutil.rmtree(path, ignore_errors=True)


def _make(folder: Path, unfinished: Path, make: Callable[[Path], str]) -> CachedFile:
    """Makes the file of a folder in another one, opens it, and gives that the folder's name."""
    _record(unfinished, make(unfinished))
    made = find(unfinished)
    if isinstance(made, str):
        raise KernelsUnavailableError(made)
    replaced = unfinished.with_name(f"{unfinished.name}-replaced")
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, replaced)
    # Where there are no locks, another process may have come first; its file is as good.
    with contextlib.suppress(OSError):
        os.rename(unfinished, folder)
        _sync_folder(folder.parent)
    return made._replace(path=folder / made.path.name)


def _record(folder: Path, name: str) -> None:
    """Writes the record of a file when the file is on the disk."""
    with open(folder / name, "rb") as file:
        os.fchmod(file.fileno(), 0o600)  # whatever the umask and the linker made it
        content = file.read()
        os.fsync(file.fileno())
    with open(folder / _DONE, "xb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(f"{hashlib.sha256(content).hexdigest()} {len(content)} {name}\n".encode())
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Not every file system does that with folders.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_cache(folder: Path) -> None:
    try:
        check_folder(folder)
    except UntrustedError as error:
        raise KernelsUnavailableError(
            f"code from {folder} could be of others: {error}; "
            + _REMEDY.format("only you can write to")
        ) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Holds the lock of a folder, which the system releases if this process dies.

    Yields:
        False if the file system has no locks: then two processes may do the same work.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(f"{folder}.lock", flags, 0o600)
    with open(descriptor, "r+", errors="replace") as file:
        is_locked = _wait_for_lock(file, folder)
        if is_locked:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield is_locked


def _wait_for_lock(file: TextIO, folder: Path) -> bool:
    import fcntl  # not on every system

    started, is_told = time.monotonic(), False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            waited = time.monotonic() - started
        except OSError as error:
            logger.info("%s.lock cannot be locked: %s", folder, error)
            return False
        file.seek(0)
        if waited > LOCK_TIMEOUT:
            raise KernelsUnavailableError(
                f"{file.read(200) or 'another process'} has held {folder}.lock for "
                f"{LOCK_TIMEOUT:.0f} seconds"
            )
        if waited > LOCK_PATIENCE and not is_told:
            logger.warning(
                "Waiting for %s, which builds %s, for up to %.0f seconds",
                file.read(200) or "another process", folder, LOCK_TIMEOUT,
            )  # fmt: skip
            is_told = True
        time.sleep(0.1)


@contextlib.contextmanager
def named_os_errors() -> Iterator[None]:
    """Turns what the file system refuses into a reason."""
    try:
        yield
    except OSError as error:
        raise KernelsUnavailableError(f"{error}; {_REMEDY.format('can be written')}") from error
