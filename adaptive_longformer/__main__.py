"""The command line: `adaptive-longformer`, or `python -m adaptive_longformer`."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from huggingface_hub.errors import StrictDataclassError

from adaptive_longformer.conversion.families import family_names

# Name -> the module that has add_parser and run, and one line of help. A module is only imported
# when its command is asked for.
_COMMANDS = {
    "answer": (
        "adaptive_longformer.inference.answer_command",
        "find the answer to a question in a long text",
    ),
    "build-kernels": (
        "adaptive_longformer.build_kernels",
        "compile the attention kernels now instead of at their first use",
    ),
    "convert": (
        "adaptive_longformer.conversion.command",
        f"take over a {family_names()} checkpoint, or give it back",
    ),
    "summarize": (
        "adaptive_longformer.inference.summarize_command",
        "summarise a text file",
    ),
    "doctor": (
        "adaptive_longformer.doctor",
        "what each attention backend can do on this machine, and why not",
    ),
    "quickstart": (
        "adaptive_longformer.quickstart",
        "convert, verify, time and fine-tune a small Longformer, with nothing to download",
    ),
    "report": (
        "adaptive_longformer.analysis.command",
        "say what the layers of an adaptive checkpoint read in a document",
    ),
}


class _Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 2 if the user asked for something that is not possible, after one line on stderr; 130
        after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else None
    parser = _Parser(
        prog="adaptive-longformer",
        description="Long-document Transformers with adaptive sparse attention.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    module = None
    try:
        for name, (module_name, summary) in _COMMANDS.items():
            if name == command:
                module = importlib.import_module(module_name)
                module.add_parser(subparsers)
            else:
                subparsers.add_parser(name, help=summary)
        args = parser.parse_args(arguments)
        assert module is not None
        return module.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, StrictDataclassError) as error:
        # Also what lies below us may raise an error of several lines.
        print(f"adaptive-longformer: {' '.join(_message(error).split())}", file=sys.stderr)
        return 2


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}" + (f" ({error.filename})" if error.filename else "")
    return str(error) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
