"""A process that runs the program `adaptive-longformer` in a forked child for every line of input.

It imports what the program needs once, and never computes: it has no other thread, whose locks a
child would wait for. Every line is a JSON object, see `Job`; the answer is a line with the exit
status and what the child wrote to stderr. What takes too long is killed by SIGALRM.
"""

import functools
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from typing import Any, NamedTuple

TIMEOUT = 100  # seconds
signal.alarm(TIMEOUT)
# Under nohup it is ignored, in children too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

import adaptive_longformer.quickstart  # noqa: E402, F401
from adaptive_longformer_command_line import start  # noqa: E402


class Job(NamedTuple):
    """What to run, and where it is interrupted.

    Attributes:
        arguments: of the command line.
        function: "module:attribute", which sends a signal to its process when it is called.
        number: of the signal.
        after: whether the function runs before it sends the signal.
        skip: so many calls of the function go through before.
        environment: variables that are set before.
    """

    arguments: list[str]
    function: str
    number: int
    after: bool = False
    skip: int = 0
    environment: dict[str, str] = {}


def interrupt(job: Job) -> None:
    module, _, path = job.function.partition(":")
    *owners, name = path.split(".")
    owner: Any = functools.reduce(getattr, owners, importlib.import_module(module))
    real, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(None)
        if len(calls) != job.skip + 1:  # what is taken back may call it again
            return real(*args, **kwargs)
        if job.after:
            real(*args, **kwargs)
        os.kill(os.getpid(), job.number)
        time.sleep(TIMEOUT)

    setattr(owner, name, call)


def run(job: Job, errors: int) -> None:
    """In the child: never returns."""
    status = 98
    try:
        signal.alarm(TIMEOUT)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number, descriptor in enumerate((nothing, nothing, errors)):
            os.dup2(descriptor, number)
        sys.argv = ["adaptive-longformer", *job.arguments]
        os.environ.update(job.environment)
        tempfile.tempdir = None  # TMPDIR is read again
        interrupt(job)
        start()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 99
    finally:
        os._exit(status)


def main() -> None:
    signal.alarm(0)  # the imports are done
    for line in sys.stdin:
        with tempfile.TemporaryFile() as errors:
            child = os.fork()
            if child == 0:
                run(Job(**json.loads(line)), errors.fileno())
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            errors.seek(0)
            print(json.dumps([status, errors.read().decode()]), flush=True)


if __name__ == "__main__":
    main()
