"""What has to be taken back if the process is told to end.

The command line ends at once when it is interrupted (see `adaptive_longformer_command_line`): no
`finally` runs then.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# With the process they belong to: what a forked child inherits is its parent's.
_undo: list[tuple[int, Callable[[], None]]] = []


@contextmanager
def taken_back_if_interrupted(undo: Callable[[], None]) -> Iterator[None]:
    """Inside, an interrupt of the command line calls `undo` before the process ends."""
    entry = (os.getpid(), undo)
    _undo.append(entry)
    try:
        yield
    finally:
        _undo.remove(entry)


def take_back_all() -> None:
    """Call everything that this process has registered, the last one first."""
    for process, undo in reversed(_undo):
        if process == os.getpid():
            undo()
