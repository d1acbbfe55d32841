"""Whether code from a place of the file system may be run: only if nobody else could put it there.

The rule is OpenSSH's for its files: a file, and every folder above it up to the root, belongs to
this user or to root and can be written by neither group nor others. Two additions:

- Who owns "/" is as good as root, whose number is another one in some containers.
- A folder above the cache may be writable if it is sticky, as /tmp is: there only owners can rename
  or remove, and what lies in it is held to the rule. The cache itself may not be such a folder.

What is checked is what is opened: links are resolved before, and no folder that passes can be
changed by others afterwards.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO


class UntrustedError(Exception):
    """Others could have put it there; the message names the path and says why."""


def check_folder(folder: Path) -> None:
    """Raises UntrustedError unless a folder, whose path has no links, and all above it pass."""
    check_path(folder)
    for path in folder.parents:
        _check(path, path.lstat(), is_folder=True, may_be_sticky=True)


def check_path(folder: Path) -> None:
    """Raises UntrustedError unless the folder itself passes, whatever is above it."""
    _check(folder, folder.lstat(), is_folder=True)


def open_trusted(path: Path) -> BinaryIO:
    """Opens a file for reading; what was opened is checked, so that nothing can come between.

    Raises:
        UntrustedError: it is not a file that only this user or root can write.
        OSError: it cannot be opened, or is a link.
    """
    # A pipe would wait for its writer.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags)
    try:
        _check(path, os.fstat(descriptor), is_folder=False)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _check(
    path: Path, status: os.stat_result, *, is_folder: bool, may_be_sticky: bool = False
) -> None:
    mode = status.st_mode
    if not (stat.S_ISDIR(mode) if is_folder else stat.S_ISREG(mode)):
        raise UntrustedError(f"{path} is not a {'folder' if is_folder else 'regular file'}")
    if status.st_uid not in (os.geteuid(), 0, os.stat("/").st_uid):
        raise UntrustedError(f"{path} belongs to another user (number {status.st_uid})")
    if may_be_sticky and mode & stat.S_ISVTX:
        return
    for bit, writers in ((stat.S_IWOTH, "every user"), (stat.S_IWGRP, "its group")):
        if mode & bit:
            raise UntrustedError(f"{writers} can write to {path} (`chmod go-w {path}` ends that)")
