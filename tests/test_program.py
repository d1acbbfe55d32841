"""The program `adaptive-longformer`: how fast it answers, its streams, and how it ends.

Most tests run it with a command of their own in place of the package: what is tested is the program
around it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LongformerConfig, LongformerForMaskedLM

import adaptive_longformer
from adaptive_longformer import quickstart
from adaptive_longformer.conversion import convert, staging
from adaptive_longformer.training import labelled_documents
from adaptive_longformer_command_line import COMMANDS, start

ROOT = Path(__file__).resolve().parents[1]
START = "from adaptive_longformer_command_line import start; start()"
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]

posix = pytest.mark.skipif(os.name != "posix", reason="signals and file descriptors of POSIX")
pytestmark = posix


@pytest.fixture
def program(tmp_path):
    """A function that gives the command line of the program, with this text as its commands."""

    def make(text: str = "def run(args): return 0", **environment: str):
        package = tmp_path / "stub" / "adaptive_longformer"
        for command in COMMANDS.values():
            file = package.parent.joinpath(*command.module.split(".")).with_suffix(".py")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"import os, signal, sys, time\n{text}\n", encoding="utf-8")
        for folder in {package, *(file.parent for file in package.rglob("*.py"))}:
            (folder / "__init__.py").touch()
        settings = {
            **os.environ,
            "PYTHONPATH": f"{package.parent}{os.pathsep}{ROOT}",
            "PYTHONUNBUFFERED": "",
            **environment,
        }

        def run(*arguments: str, shell: str = '"$@"', **options) -> subprocess.CompletedProcess:
            words = ["sh", "-c", shell, "sh", sys.executable, "-c", START, *arguments]
            options = {"capture_output": True, "timeout": 60, "cwd": tmp_path, **options}
            return subprocess.run(words, check=False, env=settings, **options)

        return run

    return make


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join
)
def test_help_is_there_at_once(arguments):
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", START, *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        seconds.append(time.monotonic() - started)
        assert done.returncode == 0 and done.stdout
        modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "argparse" in modules
        assert not {"torch", "transformers", "numpy", "adaptive_longformer"} & modules
    assert min(seconds) < 1.0  # 0.15 s where nothing else runs


def test_the_version_is_that_of_the_package():
    done = subprocess.run(
        [sys.executable, "-c", START, "--version"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == f"adaptive-longformer {adaptive_longformer.__version__}\n"


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    "text",
    [
        "os.kill(os.getpid(), {number}); time.sleep(30)",
        "def run(args): os.kill(os.getpid(), {number}); time.sleep(30)",
        # What catches everything does not hold it up.
        """
def run(args):
    while True:
        try:
            os.kill(os.getpid(), {number})
            time.sleep(30)
        except BaseException:
            pass""",
        # Nor do other threads.
        """
import threading
def run(args):
    threading.Thread(target=time.sleep, args=(30,)).start()
    os.kill(os.getpid(), {number})
    time.sleep(30)""",
    ],
    ids=["import", "run", "swallowed", "threads"],
)
def test_a_signal_ends_it_with_one_line(program, text, number):
    started = time.monotonic()
    done = program(text.format(number=int(number)))("doctor")
    assert done.returncode == 128 + number
    assert (done.stdout, done.stderr) == (b"", b"interrupted\n")
    assert time.monotonic() - started < 25


def test_a_signal_that_is_ignored_stays_so(program):
    text = "def run(args): os.kill(os.getpid(), signal.SIGINT); print('goes on'); return 0"
    done = program(text)("doctor", shell="trap '' INT; \"$@\"")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"goes on\n", b"")


def test_a_reader_that_goes_away_ends_it_without_a_word(program, tmp_path):
    text = "def run(args):\n    for i in range(100_000): print('line', i)\n    return 0"
    shell = '{ "$@"; echo $? >status; } | head -1'
    done = program(text)("doctor", shell=shell)
    assert (done.stdout, done.stderr) == (b"line 0\n", b"")
    assert (tmp_path / "status").read_text() == "141\n"
    done = program()("--help", shell='{ sleep 0.1; "$@"; } | true')
    assert done.stderr == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_that_cannot_be_written_is_one_line(program):
    done = program("def run(args): print('text'); return 0")("doctor", shell='"$@" >/dev/full')
    assert done.returncode == 2
    assert done.stderr.startswith(b"adaptive-longformer: ") and done.stderr.count(b"\n") == 1
    assert done.stderr.endswith(b"No space left on device\n")


def test_a_closed_output_is_refused_before_any_work(program):
    done = program("raise AssertionError")("doctor", shell='"$@" >&-')
    assert done.returncode == 2
    assert done.stderr.startswith(b"adaptive-longformer: standard output is closed")
    assert done.stderr.count(b"\n") == 1


def test_closed_streams_are_no_number_of_another_file(program, tmp_path):
    text = "def run(args): file = open('x', 'w'); print(file.fileno() > 2, sys.stdin); return 0"
    done = program(text)("doctor", shell='"$@" <&- 2>&-')
    assert (done.returncode, done.stdout) == (0, b"True None\n")
    text = "def run(args): sys.stderr.write('progress'); return 0"
    assert program(text)("doctor", shell='"$@" 2>&-').returncode == 0


@pytest.mark.parametrize(
    "locale",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
    ids=["ascii streams", "ascii locale"],
)
def test_text_is_utf_8_in_any_locale(program, locale):
    text = "def run(args): print(args.question, '\\u00e9', '\\ud800'); return 0"
    done = program(text, **locale)("answer", "model", "Où est le café\N{COFFIN}?")
    assert done.stderr == b""
    assert done.stdout.decode() == "Où est le café\N{COFFIN}? é ?\n"


def test_a_question_that_is_no_utf_8_is_one_line(program):
    done = program()("answer", "model", b"caf\xe9")  # type: ignore[arg-type]
    assert done.returncode == 2
    assert b"QUESTION" in done.stderr and b"not text in UTF-8" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_a_deleted_working_directory_is_one_line(program, tmp_path):
    (tmp_path / "gone").mkdir()
    done = program("raise AssertionError")(
        "doctor", shell='rmdir "$PWD"; "$@"', cwd=tmp_path / "gone"
    )
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1 and b"working directory was deleted" in done.stderr


# What follows is the package itself.


def run_forked(arguments: list[str], prepare) -> tuple[int, str]:
    """Exit status and stderr of the program in a child process, after `prepare()` there."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, 0)
            os.dup2(nothing, 1)
            os.dup2(writing, 2)
            sys.stdin, sys.stdout = open(0), open(1, "w")  # noqa: SIM115
            sys.__stdout__, sys.stderr = sys.stdout, open(2, "w")  # noqa: SIM115
            sys.argv = ["adaptive-longformer", *arguments]
            for number in SIGNALS:
                signal.signal(number, signal.default_int_handler)
            prepare()
            start()
        except SystemExit as stop:
            os._exit(stop.code if isinstance(stop.code, int) else 99)
        finally:
            os._exit(98)
    os.close(writing)
    with open(reading, "rb") as errors:
        text = errors.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def interrupting(module, name: str, number: int, *, after: bool = False):
    """A function that makes a function of a module send a signal to its process."""

    def prepare() -> None:
        real = getattr(module, name)

        def call(*args, **kwargs):
            if after:
                real(*args, **kwargs)
            os.kill(os.getpid(), number)
            time.sleep(30)

        setattr(module, name, call)

    return prepare


@pytest.fixture
def source(tmp_path):
    config = LongformerConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, attention_window=16, max_position_embeddings=66,
    )  # fmt: skip
    LongformerForMaskedLM(config).save_pretrained(tmp_path / "source")
    return str(tmp_path / "source")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("module", "name", "after"),
    [
        (convert, "plan_conversion", False),
        (convert, "write_weights", False),
        (convert, "_write", True),
        (convert, "measure_agreement", False),
        (convert, "model_card", True),
        (staging, "_move", False),
        (torch, "equal", False),
    ],
)
def test_an_interrupted_conversion_leaves_nothing(source, tmp_path, module, name, after, number):
    target = tmp_path / "target"
    arguments = ["convert", source, str(target), "--verify"]
    status, errors = run_forked(arguments, interrupting(module, name, number, after=after))
    assert status == 128 + number
    assert errors.splitlines()[-1] == "interrupted" and "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("moves", [0, 1])
def test_an_interrupted_replacement_leaves_what_was_there(source, tmp_path, moves):
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text("{}")

    def prepare():
        replace, done = os.replace, []

        def interrupted(*args):
            if len(done) == moves:
                done.append(None)
                os.kill(os.getpid(), signal.SIGINT)
            replace(*args)
            done.append(None)

        staging.os.replace = interrupted

    status, errors = run_forked(["convert", source, str(target), "--overwrite"], prepare)
    assert (status, errors.splitlines()[-1]) == (130, "interrupted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
    assert (target / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (labelled_documents, "with_class_labels"),
        (quickstart, "convert_checkpoint"),
        (convert, "_verify"),
        (quickstart, "time_both"),
        (quickstart.Trainer, "training_step"),
        (quickstart.Trainer, "save_model"),
    ],
)
def test_an_interrupted_quickstart_leaves_nothing(tmp_path, monkeypatch, module, name):
    texts = [f"document {i} " + ("apple " if i % 2 else "pear ") * 60 for i in range(20)]
    rows = [json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(texts)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    output = tmp_path / "runs" / "output"
    arguments = ["--data", str(tmp_path / "data.jsonl"), "--output", str(output)]
    arguments += ["--max-length", "64"]
    prepare = interrupting(module, name, signal.SIGINT)
    status, errors = run_forked(["quickstart", *arguments], prepare)
    assert status == 130, errors
    assert errors.splitlines()[-1] == "interrupted" and "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "temporary"]
    assert list((tmp_path / "temporary").iterdir()) == []
