"""A folder that appears whole or not at all."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_target(target: str | Path, source: Path, overwrite: bool) -> Path:
    """Return where a conversion writes to, or raise if something is in the way.

    Raises:
        FileExistsError: the target exists, and `overwrite` is not set or it is no checkpoint.
        ValueError: target and source overlap.
    """
    folder = Path(target).expanduser().resolve()
    origin = source.resolve()
    if folder == origin or folder in origin.parents or origin in folder.parents:
        raise ValueError(f"target: {folder} overlaps the source {origin}; choose another folder")
    if folder.exists():
        if not overwrite:
            raise FileExistsError(
                f"target: {folder} exists; choose another folder, or replace it with --overwrite "
                "(overwrite=True)"
            )
        if not folder.is_dir() or (
            any(folder.iterdir()) and not (folder / "config.json").is_file()
        ):
            raise FileExistsError(
                f"target: {folder} exists and is no checkpoint folder (it has no config.json); "
                "it is not replaced"
            )
    return folder


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside `target` that is moved to its place at the end.

    If anything goes wrong inside, the temporary folder is removed and the target is as before. A
    killed process leaves a folder named `.<target>.converting-*`, which can be deleted.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.converting-", dir=target.parent))
    try:
        # mkdtemp makes it private; a checkpoint is as readable as any other new folder.
        umask = os.umask(0)
        os.umask(umask)
        folder.chmod(0o777 & ~umask)
        yield folder
        _move(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, target: Path) -> None:
    """Move a folder to its place; what was there before is removed only after that."""
    replaced = folder.with_name(f"{folder.name}-replaced")
    if target.exists():
        os.replace(target, replaced)
    try:
        os.replace(folder, target)
    except OSError as error:
        if replaced.exists():
            os.replace(replaced, target)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(f"target: {target} was written by somebody else") from error
        raise
    shutil.rmtree(replaced, ignore_errors=True)
