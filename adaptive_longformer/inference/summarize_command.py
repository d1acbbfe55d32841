"""The command `adaptive-longformer summarize`."""

import argparse
import sys

from transformers.utils import logging as transformers_logging

from adaptive_longformer.gpu import move_to_gpu
from adaptive_longformer.inference.document_file import read_document
from adaptive_longformer.inference.summarization import summarize
from adaptive_longformer.load_checkpoint import load_model, load_tokenizer
from adaptive_longformer.modeling.modeling_adaptive_sparse_seq2seq import (
    AdaptiveSparseForConditionalGeneration,
)
from adaptive_longformer.progress_line import ProgressLine


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `summarize` and its arguments."""
    parser = subparsers.add_parser(
        "summarize",
        help="summarise a text file",
        description="Summarise one document, a text file in UTF-8 or what comes from stdin.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of a converted model")
    parser.add_argument(
        "file", metavar="FILE", nargs="?", default="-", help="text file; - (default) is stdin"
    )
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
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")


def run(args: argparse.Namespace) -> int:
    """Summarise and print the summary on stdout; everything else goes to stderr."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    options = {}
    if args.num_beams is not None:
        if args.num_beams < 1:
            raise ValueError(f"--num-beams: {args.num_beams} is not allowed, give 1 or more")
        options["num_beams"] = args.num_beams
    text = read_document(args.file)
    model = load_model(AdaptiveSparseForConditionalGeneration, args.model)
    tokenizer = load_tokenizer(args.model)
    device = None if args.cpu else move_to_gpu(model)
    if device is not None:
        sys.stderr.write(f"on {device}\n")
    progress = ProgressLine()
    try:
        summary = summarize(
            model,
            tokenizer,
            text,
            max_new_tokens=args.max_new_tokens,
            progress=progress,
            **options,
        )
    finally:
        progress.end()
    if not summary.is_of_the_whole_document:
        sys.stderr.write(
            f"note: the model read the first {summary.num_tokens_read:,} of the document's "
            f"{summary.num_tokens:,} tokens\n"
        )
    sys.stdout.write(summary.text + "\n")
    return 0
