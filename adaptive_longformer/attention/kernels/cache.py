"""The folder that compiled kernels are kept in: where it is, who may write to it, and its locks."""

import contextlib
import logging
import os
import platform
import stat
import time
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK_TIMEOUT = 600.0


class ExtensionUnavailableError(RuntimeError):
    """The compiled kernels cannot be used here; the message says why."""


def cache_folder() -> Path:
    """The folder of all builds; ADAPTIVE_LONGFORMER_CACHE names another one.

    Raises:
        ExtensionUnavailableError: none is named, and this user has no home.
    """
    if cache := os.environ.get("ADAPTIVE_LONGFORMER_CACHE"):
        return Path(cache)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "adaptive_longformer"
    try:
        return Path.home() / ".cache" / "adaptive_longformer"
    except RuntimeError as error:
        raise ExtensionUnavailableError(
            f"{error}; ADAPTIVE_LONGFORMER_CACHE names a folder that can be written"
        ) from error


def kernels_mode() -> str:
    """What ADAPTIVE_LONGFORMER_KERNELS allows: "on" or "cached".

    Raises:
        ExtensionUnavailableError: it is "off", or a word without a meaning.
    """
    mode = os.environ.get("ADAPTIVE_LONGFORMER_KERNELS", "on")
    if mode == "off":
        raise ExtensionUnavailableError("ADAPTIVE_LONGFORMER_KERNELS is 'off'")
    if mode not in ("on", "cached"):
        raise ExtensionUnavailableError(
            f"ADAPTIVE_LONGFORMER_KERNELS is {mode!r}, 'on', 'cached' or 'off' is allowed"
        )
    return mode


def refuse_unsafe_folder(folder: Path) -> None:
    """Raises unless only its owner, this user or root, can put code there."""
    for path in (folder, *folder.resolve().parents):
        status = path.stat()
        is_sticky_parent = path != folder and status.st_mode & stat.S_ISVTX
        if status.st_mode & stat.S_IWOTH and not is_sticky_parent:
            raise ExtensionUnavailableError(
                f"every user can write to {path}, and code from {folder} would be run"
            )
    if folder.stat().st_uid not in (os.geteuid(), 0):
        raise ExtensionUnavailableError(f"{folder} belongs to another user")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a build's folder, which the system releases if this process dies."""
    try:
        import fcntl
    except ImportError as error:
        raise ExtensionUnavailableError(f"no file locks on {platform.system()}") from error
    with open(f"{folder}.lock", "w") as file:
        deadline, is_announced = time.monotonic() + LOCK_TIMEOUT, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not is_announced:
                    logger.info("Waiting for another process that builds in %s", folder)
                    is_announced = True
                if time.monotonic() > deadline:
                    raise ExtensionUnavailableError(
                        f"another process has held {folder}.lock for {LOCK_TIMEOUT:.0f} seconds"
                    ) from None
                time.sleep(0.1)
        yield


@contextlib.contextmanager
def named_os_errors() -> Iterator[None]:
    """Turns what the file system refuses into a reason."""
    try:
        yield
    except OSError as error:
        raise ExtensionUnavailableError(
            f"{error}; ADAPTIVE_LONGFORMER_CACHE names a folder that can be written"
        ) from error
