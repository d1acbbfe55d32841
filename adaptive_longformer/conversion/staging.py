"""A folder that appears whole or not at all."""

import errno
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from adaptive_longformer.unfinished import taken_back_if_interrupted


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


def left_behind(target: Path) -> list[str]:
    """Return notes on what conversions to a target that were killed have left beside it."""
    name = glob.escape(target.name)
    found = {
        *target.parent.glob(f".{name}.converting-*"),
        *target.parent.glob(f"{name}.replaced-*"),
    }
    return [
        f"{folder} is left of a conversion that was killed (or still runs): "
        + ("what was at the target before" if ".replaced-" in folder.name else "unfinished")
        for folder in sorted(found)
    ]


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside `target` that is moved to its place at the end.

    If anything goes wrong inside, the temporary folder is removed and the target is as before. A
    killed process may leave a folder named `.<target>.converting-*`, which can be deleted. What is
    at the target is named `<target>.replaced-*` for the moment in which the new folder takes its
    place, and deleted afterwards: one of both is always at the target or beside it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    folder = target.with_name(f".{target.name}.converting-{token}")
    replaced = target.with_name(f"{target.name}.replaced-{token}")
    with taken_back_if_interrupted(partial(_discard, folder, replaced, target)):
        try:
            folder.mkdir()
            yield folder
            _move(folder, replaced, target)
        finally:
            _discard(folder, replaced, target)


def _move(folder: Path, replaced: Path, target: Path) -> None:
    """Move a folder to its place, after what is there was moved away."""
    if target.exists():
        os.replace(target, replaced)
    try:
        os.replace(folder, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(f"target: {target} was written by somebody else") from error
        raise


def _discard(folder: Path, replaced: Path, target: Path) -> None:
    """Remove what is left of a folder, and what it has replaced, which goes back if it has not."""
    if not folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
    elif replaced.exists() and not target.exists():
        os.replace(replaced, target)
    shutil.rmtree(folder, ignore_errors=True)
