"""The command `adaptive-longformer convert`."""

import argparse
import sys

from adaptive_longformer.command_inputs import silence_transformers
from adaptive_longformer.conversion.convert import ConversionReport, convert_checkpoint
from adaptive_longformer.progress_line import ProgressLine


def run(args: argparse.Namespace) -> int:
    """Convert and print what was done."""
    silence_transformers()
    with ProgressLine() as progress:
        report = convert_checkpoint(
            args.source,
            args.target,
            max_positions=args.max_positions,
            attention_window=args.attention_window,
            verify=args.verify,
            reverse=args.reverse,
            drop_adaptive=args.drop_adaptive,
            overwrite=args.overwrite,
            push_to=args.push_to,
            private=args.private,
            progress=progress,
        )
    sys.stdout.write(_summary(report))
    return 0


def _summary(report: ConversionReport) -> str:
    lines = [
        f"{report.source} ({report.source_model_type}) -> {report.target} ({report.architecture})",
        f"parameters: {report.num_parameters:,}   size: {report.size_bytes / 1e6:,.1f} MB",
    ]
    if report.max_logit_difference is not None:
        lines.append(f"max |logit difference|: {report.max_logit_difference:.3g}")
    if report.address is not None:
        lines.append(f"on the hub: {report.address}")
    lines += [f"note: {note}" for note in report.notes]
    return "\n".join(lines) + "\n"
