"""The command line: `adaptive-longformer`, or `python -m adaptive_longformer`.

A module of its own beside the package: help and mistakes are answered at once, while an import of
the package also imports torch and Transformers.
"""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

_BROKEN_PIPE = 128 + 13  # what a shell reports of a program that SIGPIPE has ended


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="checkpoint folder or hub id")
    parser.add_argument("target", metavar="TARGET", help="folder to write")
    parser.add_argument(
        "--max-positions",
        type=int,
        metavar="N",
        help="tokens the result can read, up to 131072 (default: as the source)",
    )
    parser.add_argument(
        "--attention-window",
        type=int,
        metavar="W",
        help=(
            "tokens each token sees around itself, both sides together (default: the source's own; "
            "RoBERTa and BERT: twice their longest input)"
        ),
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="run both models and refuse a result whose logits differ",
    )
    parser.add_argument(
        "--reverse", action="store_true", help="convert one of our checkpoints back to its source"
    )
    parser.add_argument(
        "--drop-adaptive",
        action="store_true",
        help="with --reverse: leave out a selection of blocks that is in use (other logits)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a checkpoint that is at TARGET, and the model of --push-to",
    )
    parser.add_argument(
        "--push-to",
        metavar="USER/NAME",
        help="also put TARGET on the hub, as the user whose token is stored (hf auth login)",
    )
    parser.add_argument(
        "--private", action="store_true", help="with --push-to: nobody else sees a new model"
    )


def _answer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or hub id")
    parser.add_argument("question", metavar="QUESTION", type=_text)
    _add_document(parser)
    parser.add_argument("--answers", type=int, default=1, metavar="N", help="how many to print")
    parser.add_argument(
        "--max-answer-tokens",
        type=int,
        metavar="N",
        help="longest answer (default: 30, or the model's own setting if it writes answers)",
    )
    _add_cpu(parser)


def _summarize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of a converted model")
    _add_document(parser)
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="longest summary in tokens (default: the model's own setting, or 256)",
    )
    parser.add_argument(
        "--num-beams",
        type=int,
        metavar="N",
        help="width of the beam search (default: the model's own setting, or 4)",
    )
    _add_cpu(parser)


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or hub id")
    _add_document(parser)
    parser.add_argument(
        "--strength",
        type=float,
        metavar="S",
        help="read selected blocks with this strength, 0 to 1 (default: the checkpoint's own); "
        "makes any longformer checkpoint select",
    )
    parser.add_argument("--json", metavar="PATH", help="also write the numbers to this file")
    parser.add_argument("--figure", metavar="PATH", help="also draw who reads whom, as PNG")
    _add_cpu(parser)


def _quickstart(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source",
        metavar="PATH_OR_ID",
        help="Longformer, RoBERTa or BERT checkpoint: a folder or a hub id",
    )
    parser.add_argument(
        "--data", metavar="FILE", help="csv, json, jsonl or parquet file of labelled documents"
    )
    parser.add_argument("--text-column", default="text", metavar="NAME", help="default: text")
    parser.add_argument("--label-column", default="label", metavar="NAME", help="default: label")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="new folder for everything that is written (default: runs/quickstart-<time>)",
    )
    parser.add_argument("--epochs", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument(
        "--max-length",
        type=int,
        default=4096,
        metavar="N",
        help="longest document in tokens (default: 4096)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of a converted encoder")
    parser.add_argument("target", metavar="TARGET", help="folder to write")
    parser.add_argument(
        "--format",
        choices=("onnx", "torch"),
        default="onnx",
        help="onnx (default): model.onnx; torch: model.pt2, for torch.export.load",
    )
    parser.add_argument(
        "--max-global-tokens",
        type=int,
        metavar="N",
        help="room for so many global tokens per sequence, the first ones (default: the model's "
        "own; or 1 where only the first token is global, 64 elsewhere)",
    )
    parser.add_argument(
        "--global-attention-mask",
        action="store_true",
        help="have global_attention_mask as an input (default: the model marks its default tokens)",
    )
    parser.add_argument(
        "--window-only",
        action="store_true",
        help="leave out a selection of blocks that is in use (other results)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a checkpoint or an export at TARGET"
    )


def _build_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kinds",
        nargs="*",
        metavar="KIND",
        help="cpu, cuda (default: cpu, and cuda where torch sees a GPU)",
    )


def _doctor(parser: argparse.ArgumentParser) -> None:
    pass


def _add_document(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        metavar="FILE",
        nargs="?",
        default="-",
        help="the document, a text file in UTF-8; - (default) is standard input",
    )


def _add_cpu(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")


def _text(argument: str) -> str:
    """An argument as the UTF-8 that it is, also where the locale knows only ASCII."""
    try:
        argument.encode()
        return argument
    except UnicodeEncodeError:
        pass
    try:
        return os.fsencode(argument).decode()
    except UnicodeError as error:
        raise argparse.ArgumentTypeError(f"{argument!r} is not text in UTF-8") from error


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        module: the module whose `run(args)` returns the exit status; imported when it is asked for.
        summary: one line for the list of commands.
        add_arguments: adds its arguments to a parser.
        details: what its own help says beside the summary.
    """

    module: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    details: str = ""


COMMANDS = {
    "convert": Command(
        "adaptive_longformer.conversion.command",
        "take over a Longformer, LED, BigBird, BigBird-Pegasus, RoBERTa, XLM-RoBERTa, CamemBERT or "
        "BERT checkpoint, or give it back",
        _convert,
        "The logits are equal.",
    ),
    "quickstart": Command(
        "adaptive_longformer.quickstart",
        "convert, verify, time and fine-tune a small Longformer, with nothing to download",
        _quickstart,
        "By default a small Longformer with random weights is made on the spot, and the documents "
        "are the source files of Python's standard library.",
    ),
    "answer": Command(
        "adaptive_longformer.inference.answer_command",
        "find the answer to a question in a text file of any length",
        _answer,
    ),
    "summarize": Command(
        "adaptive_longformer.inference.summarize_command", "summarise a text file", _summarize
    ),
    "report": Command(
        "adaptive_longformer.analysis.command",
        "say what the layers of an adaptive checkpoint read in a document",
        _report,
    ),
    "export": Command(
        "adaptive_longformer.export",
        "write an encoder as a graph for ONNX Runtime, or for torch.export.load",
        _export,
        "Batch size and length stay open; the result is compared with the model.",
    ),
    "doctor": Command(
        "adaptive_longformer.doctor",
        "what each attention backend can do on this machine, and why not",
        _doctor,
        "Checks the results too, and compiles the kernels if they are not in the cache yet.",
    ),
    "build-kernels": Command(
        "adaptive_longformer.build_kernels",
        "compile the attention kernels now instead of at their first use",
        _build_kernels,
        "They are compiled into the cache, for this machine's processor and GPUs.",
    ),
}


class _Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    """Prints the version; it is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *args: object) -> NoReturn:
        print(f"adaptive-longformer {_version()}")
        parser.exit()


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("adaptive-longformer")
    except metadata.PackageNotFoundError:  # a clone that is not installed
        return importlib.import_module("adaptive_longformer").__version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 2 if the user asked for something that is not possible, after one line on stderr; 130
        after a KeyboardInterrupt; 1 where a command says so.
    """
    parser = _Parser(
        prog="adaptive-longformer",
        description="Long-document Transformers with adaptive sparse attention.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        description = f"{command.summary[0].upper()}{command.summary[1:]}. {command.details}"
        command.add_arguments(
            commands.add_parser(name, help=command.summary, description=description)
        )
    args = parser.parse_args(argv)
    try:
        return importlib.import_module(COMMANDS[args.command].module).run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        raise
    except Exception as error:
        if not isinstance(error, ValueError | OSError) and not _is_of_a_configuration(error):
            raise
        return _refuse(_message(error))


def start() -> NoReturn:
    """Run as a program: `main`, with streams, signals and exit status as users of a shell expect.

    Text is UTF-8 whatever the locale says. SIGINT, SIGTERM and SIGHUP end it with one line and take
    back what is unfinished. A reader that goes away, as `head` does, ends it without a word.
    """
    _end_on_signals()
    _open_streams()
    try:
        status = _run()
        # Now, and not where Python would say that an exception was ignored.
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        status = _BROKEN_PIPE
        _point_at_nothing(sys.stdout, sys.stderr)
    except OSError as error:
        _point_at_nothing(sys.stdout)
        status = _refuse(f"standard output: {_message(error)}")
    sys.exit(status)


def _run() -> int:
    if sys.__stdout__ is None:
        return _refuse("standard output is closed, a file or /dev/null is needed")
    try:
        os.getcwd()
    except FileNotFoundError:
        return _refuse("the working directory was deleted, change to another one")
    try:
        return main()
    except SystemExit as stop:  # help, version and mistakes in the arguments
        return stop.code if isinstance(stop.code, int) else 0


def _end_on_signals() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # As `nohup` and the background of a shell want it, what is ignored stays so.
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """Ends the program between two of its instructions.

    An exception would not do: in an import or in a callback it is lost, or becomes another one.
    """
    signal.signal(number, signal.SIG_IGN)
    if unfinished := sys.modules.get("adaptive_longformer.unfinished"):
        unfinished.take_back_all()
    with suppress(OSError):
        os.write(2, b"\ninterrupted\n" if os.isatty(2) else b"interrupted\n")
    os._exit(128 + number)


def _open_streams() -> None:
    """Makes the streams UTF-8, and no file that is opened later one of those that were closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the end)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]


def _point_at_nothing(*streams) -> None:
    """What is still in the buffers of streams has nowhere to go."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nothing, stream.fileno())


def _refuse(message: str) -> int:
    # What lies below us may raise an error of several lines.
    print(f"adaptive-longformer: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}" + (f" ({error.filename})" if error.filename else "")
    return str(error) or type(error).__name__


def _is_of_a_configuration(error: Exception) -> bool:
    """Whether a field of a config.json has a wrong type or value."""
    from huggingface_hub.errors import StrictDataclassError

    return isinstance(error, StrictDataclassError)
