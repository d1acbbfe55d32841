"""Runs the commands of the documentation, or only checks that they would be understood."""

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from doc_pages import ROOT

from adaptive_longformer_command_line import COMMANDS, main


class UnderstoodError(Exception):
    """The command line was parsed without an error."""


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs one command of a page in the current folder; fails unless it succeeds.

    Ours run in this process, for the sake of time; a command with an environment variable in front
    in one of its own, since such variables are read once.
    """
    words = shlex.split(command, comments=True)
    if "=" in words[0]:
        name, value = words[0].split("=", 1)
        module = {"adaptive-longformer": ["-m", "adaptive_longformer"]}.get(words[1])
        assert module, f"{command}: only adaptive-longformer runs with a variable"
        process = subprocess.run(
            [sys.executable, *module, *words[2:]],
            env={**os.environ, "PYTHONPATH": str(ROOT), name: value}, check=False,
        )  # fmt: skip
        status = process.returncode
    elif words[0] == "adaptive-longformer":
        status = _status_of(lambda: main(words[1:]))
    elif words[0] == "python":
        status = _status_of(lambda: _run_script(words[1:], monkeypatch))
    else:
        pytest.fail(f"{command}: mark it as not run, and say why")
    assert status in (0, None), f"{command}: exit status {status}"


def understand(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a command has an option, a target or a file that does not exist; runs nothing."""
    words = shlex.split(command, comments=True)
    while "=" in words[0]:
        words = words[1:]
    program, arguments = words[0], words[1:]
    if words == ["accelerate", "launch"]:  # a name in the text
        return
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        for word in arguments:
            assert "=" in word or word in targets, f"{command}: the Makefile has no {word}"
    elif program == "pip":
        _understand_pip(command, arguments)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(arguments)
        _understand_script([args.training_script, *args.training_script_args], monkeypatch)
    elif program == "sbatch":
        job = next(word for word in arguments if word.endswith(".sh"))
        assert (ROOT / job).is_file(), f"{command}: there is no {job}"
        _understand_script(arguments[arguments.index(job) + 1 :], monkeypatch)
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        args = launch_command_parser().parse_args(arguments[1:])
        _understand_script([args.training_script, *args.training_script_args], monkeypatch)
    elif program == "adaptive-longformer" and len(arguments) == 1:
        # In the text the name of a command stands for the command.
        assert arguments[0] in COMMANDS or arguments[0].startswith("--"), command
    elif program == "adaptive-longformer":
        _parse_only(lambda: main(arguments), monkeypatch)
    elif program == "python":
        _understand_script(arguments, monkeypatch)
    elif program == "curl":
        pass
    else:
        pytest.fail(f"{command}: the tests know no {program}")


def _understand_pip(command: str, arguments: list[str]) -> None:
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
    assert arguments[0] == "install"
    for previous, word in pairwise(arguments):
        if previous == "-c":
            assert (ROOT / word).is_file(), f"{command}: there is no {word}"
        for extra in re.findall(r"^\.\[(.+)\]$", word):
            assert set(extra.split(",")) <= set(extras), f"{command}: there is no extra {extra}"


def _understand_script(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if arguments[0].endswith(".py"):
        _parse_only(lambda: _run_script(arguments, monkeypatch), monkeypatch)


def _parse_only(call: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a program parse its arguments and stops it there."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, *args, **kwargs):
        parse_args(parser, *args, **kwargs)
        raise UnderstoodError

    with monkeypatch.context() as patch, pytest.raises(UnderstoodError):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        call()


def _run_script(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    script = Path(arguments[0])
    file = script if script.exists() else ROOT / script
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [arguments[0], *arguments[1:]])
        # What Python does for a script: its folder is where its own modules are.
        patch.syspath_prepend(str(file.resolve().parent))
        runpy.run_path(str(file), run_name="__main__")
    return 0


def _status_of(call: Callable[[], int]) -> int | str | None:
    try:
        return call()
    except SystemExit as end:
        return end.code
