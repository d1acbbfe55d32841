"""Progress of long work on the command line."""

import sys


class ProgressLine:
    """One line per stage on stderr, rewritten in place on a terminal; `with` finishes the last."""

    def __init__(self) -> None:
        self._stage = ""

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()

    def __call__(self, stage: str, done: int, total: int) -> None:
        on_terminal = sys.stderr.isatty()
        if stage != self._stage:
            self._end()
            self._stage = stage
        elif not on_terminal and done < total:
            return
        text = f"{stage}: {100 * done // max(1, total)} %"
        sys.stderr.write(f"\r{text}" if on_terminal else f"{text}\n")
        sys.stderr.flush()

    def _end(self) -> None:
        if self._stage and sys.stderr.isatty():
            sys.stderr.write("\n")
        self._stage = ""
