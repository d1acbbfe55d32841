"""The command `adaptive-longformer convert`."""

import argparse
import sys

from transformers.utils import logging as transformers_logging

from adaptive_longformer.conversion.convert import ConversionReport, convert_checkpoint
from adaptive_longformer.conversion.families import family_names
from adaptive_longformer.progress_line import ProgressLine


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `convert` and its arguments."""
    parser = subparsers.add_parser(
        "convert",
        help="take over a checkpoint of another family, or give it back",
        description=(f"Convert a {family_names()} checkpoint with equal logits, or give it back."),
    )
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
        "--overwrite", action="store_true", help="replace a checkpoint that is at TARGET"
    )


def run(args: argparse.Namespace) -> int:
    """Convert and print what was done."""
    # Two models are loaded to verify; their load reports would bury the result.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    progress = ProgressLine()
    try:
        report = convert_checkpoint(
            args.source,
            args.target,
            max_positions=args.max_positions,
            attention_window=args.attention_window,
            verify=args.verify,
            reverse=args.reverse,
            drop_adaptive=args.drop_adaptive,
            overwrite=args.overwrite,
            progress=progress,
        )
    finally:
        progress.end()
    sys.stdout.write(_summary(report))
    return 0


def _summary(report: ConversionReport) -> str:
    lines = [
        f"{report.source} ({report.source_model_type}) -> {report.target} ({report.architecture})",
        f"parameters: {report.num_parameters:,}   size: {report.size_bytes / 1e6:,.1f} MB",
    ]
    if report.max_logit_difference is not None:
        lines.append(f"max |logit difference|: {report.max_logit_difference:.3g}")
    lines += [f"note: {note}" for note in report.notes]
    return "\n".join(lines) + "\n"
