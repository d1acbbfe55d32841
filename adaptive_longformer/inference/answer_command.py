"""The command `adaptive-longformer answer`."""

import argparse
import sys

from transformers import AutoModelForQuestionAnswering
from transformers.utils import logging as transformers_logging

from adaptive_longformer.gpu import move_to_gpu
from adaptive_longformer.inference.document_file import read_document
from adaptive_longformer.inference.question_answering import answer_question
from adaptive_longformer.load_checkpoint import load_model, load_tokenizer
from adaptive_longformer.progress_line import ProgressLine


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `answer` and its arguments."""
    parser = subparsers.add_parser(
        "answer",
        help="find the answer to a question in a long text",
        description="Find the answer to a question in a text file of any length.",
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or hub id")
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument(
        "file", metavar="FILE", nargs="?", default="-", help="text file (default: standard input)"
    )
    parser.add_argument("--answers", type=int, default=1, metavar="N", help="how many to print")
    parser.add_argument(
        "--max-answer-tokens", type=int, default=30, metavar="N", help="longest answer"
    )
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")


def run(args: argparse.Namespace) -> int:
    """Print one answer per line: its score, its characters in the text, and the answer."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    document = read_document(args.file)
    tokenizer = load_tokenizer(args.model)
    model = load_model(AutoModelForQuestionAnswering, args.model)
    device = None if args.cpu else move_to_gpu(model)
    if device is not None:
        sys.stderr.write(f"on {device}\n")
    progress = ProgressLine()
    try:
        answers = answer_question(
            model,
            tokenizer,
            args.question,
            document,
            num_answers=args.answers,
            max_answer_tokens=args.max_answer_tokens,
            progress=lambda done, total: progress("reading", done, total),
        )
    finally:
        progress.end()
    for answer in answers:
        text = " ".join(answer.text.split())
        sys.stdout.write(f"{answer.score:.3f}\t{answer.start}-{answer.end}\t{text}\n")
    return 0
