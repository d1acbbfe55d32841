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
from transformers import LongformerConfig, LongformerForMaskedLM

import adaptive_longformer
from adaptive_longformer.training.small_longformer import train_byte_level_tokenizer
from adaptive_longformer_command_line import COMMANDS

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
            # Under nohup SIGHUP is ignored, in children too.
            before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
            try:
                return subprocess.run(words, check=False, env=settings, **options)
            finally:
                signal.signal(signal.SIGHUP, before)

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


# What follows is the package itself, see forking_program.py.


@pytest.fixture(scope="module")
def run_interrupted():
    """A function that runs a `Job`: exit status and the lines of stderr."""
    command = [sys.executable, str(Path(__file__).with_name("forking_program.py"))]
    settings = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=settings
    ) as program:
        assert program.stdin is not None and program.stdout is not None

        def run(**job) -> tuple[int, list[str]]:
            print(json.dumps(job), file=program.stdin, flush=True)
            status, errors = json.loads(program.stdout.readline())
            return status, errors.splitlines()

        yield run
        program.stdin.close()


@pytest.fixture
def source(tmp_path):
    """A checkpoint whose conversion and training take no time."""
    tokenizer = train_byte_level_tokenizer(["document apple pear"], vocab_size=300)
    config = LongformerConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, attention_window=16, max_position_embeddings=66,
    )  # fmt: skip
    LongformerForMaskedLM(config).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    return str(tmp_path / "source")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("function", "after"),
    [
        ("adaptive_longformer.conversion.convert:plan_conversion", False),
        ("adaptive_longformer.conversion.convert:write_weights", False),
        ("adaptive_longformer.conversion.convert:_write", True),
        ("adaptive_longformer.conversion.convert:measure_agreement", False),
        ("adaptive_longformer.conversion.convert:model_card", True),
        ("adaptive_longformer.conversion.staging:_move", False),
        ("torch:equal", False),
    ],
)
def test_an_interrupted_conversion_leaves_nothing(
    run_interrupted, source, tmp_path, function, after, number
):
    status, errors = run_interrupted(
        arguments=["convert", source, str(tmp_path / "target"), "--verify"],
        function=function, after=after, number=number,
    )  # fmt: skip
    assert (status, errors[-1]) == (128 + number, "interrupted")
    assert not any("Traceback" in line for line in errors)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("moves", [0, 1])
def test_an_interrupted_replacement_leaves_what_was_there(run_interrupted, source, tmp_path, moves):
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text("{}")
    status, errors = run_interrupted(
        arguments=["convert", source, str(target), "--overwrite"],
        function="os:replace", skip=moves, number=signal.SIGINT,
    )  # fmt: skip
    assert (status, errors[-1]) == (130, "interrupted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
    assert (target / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    "function",
    [
        "training.labelled_documents:read_rows",
        "quickstart:convert_checkpoint",
        "conversion.convert:_verify",
        "quickstart:time_both",
        "quickstart:Trainer.training_step",
        "quickstart:Trainer.save_model",
    ],
)
def test_an_interrupted_quickstart_leaves_nothing(run_interrupted, source, tmp_path, function):
    texts = [f"document {i} " + ("apple " if i % 2 else "pear ") * 60 for i in range(20)]
    rows = [json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(texts)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    (tmp_path / "temporary").mkdir()
    output = tmp_path / "runs" / "output"
    arguments = ["--source", source, "--data", str(tmp_path / "data.jsonl")]
    arguments += ["--output", str(output), "--max-length", "64", "--epochs", "1"]
    status, errors = run_interrupted(
        arguments=["quickstart", *arguments],
        function=f"adaptive_longformer.{function}", number=signal.SIGINT,
        environment={"TMPDIR": str(tmp_path / "temporary")},
    )  # fmt: skip
    assert status == 130, errors
    assert errors[-1] == "interrupted" and not any("Traceback" in line for line in errors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "source", "temporary"]
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupted_build_of_the_kernels_leaves_nothing(run_interrupted, tmp_path, number):
    cache = tmp_path / "cache"
    status, errors = run_interrupted(
        arguments=["build-kernels", "cpu"], function="torch.utils.cpp_extension:load",
        environment={"ADAPTIVE_LONGFORMER_CACHE": str(cache)}, number=number,
    )  # fmt: skip
    assert (status, errors) == (128 + number, ["interrupted"])
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
