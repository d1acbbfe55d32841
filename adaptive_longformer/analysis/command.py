"""The command `adaptive-longformer report`."""

import argparse
import json
import sys
from pathlib import Path

from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from adaptive_longformer.analysis.reading_map import reading_maps, save_reading_maps
from adaptive_longformer.analysis.sparsity import sparsity_report
from adaptive_longformer.configuration.configuration_adaptive_sparse import AdaptiveSparseConfig
from adaptive_longformer.configuration.configuration_adaptive_sparse_seq2seq import (
    AdaptiveSparseSeq2SeqConfig,
)
from adaptive_longformer.gpu import move_to_gpu
from adaptive_longformer.load_checkpoint import load_model, load_tokenizer
from adaptive_longformer.modeling.adaptive_selection import set_selection_strength
from adaptive_longformer.modeling.modeling_adaptive_sparse import (
    AdaptiveSparseModel,
    AdaptiveSparsePreTrainedModel,
)
from adaptive_longformer.modeling.modeling_adaptive_sparse_causal import (
    AdaptiveSparseCausalModel,
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `report` and its arguments."""
    parser = subparsers.add_parser(
        "report",
        help="say what the layers of an adaptive checkpoint read in a document",
        description="Say what the layers of an adaptive checkpoint read in a document.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or hub id")
    parser.add_argument("file", metavar="FILE", help="the document, a text file in UTF-8")
    parser.add_argument(
        "--strength",
        type=float,
        metavar="S",
        help="read selected blocks with this strength, 0 to 1 (default: the checkpoint's own); "
        "makes any longformer checkpoint select",
    )
    parser.add_argument("--json", metavar="PATH", help="also write the numbers to this file")
    parser.add_argument("--figure", metavar="PATH", help="also draw who reads whom, as PNG")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")


def run(args: argparse.Namespace) -> int:
    """Run the checkpoint on the document and print what its layers read."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    text = _read_text(args.file)
    config = AutoConfig.from_pretrained(args.checkpoint)
    if isinstance(config, AdaptiveSparseSeq2SeqConfig):
        raise ValueError(
            f"CHECKPOINT: {args.checkpoint} is an encoder-decoder, an encoder or a causal model is "
            "needed"
        )
    if not isinstance(config, AdaptiveSparseConfig):
        raise ValueError(
            f"CHECKPOINT: {args.checkpoint} is a {config.model_type} checkpoint; convert it first: "
            f"adaptive-longformer convert {args.checkpoint} TARGET"
        )
    if args.strength is not None:
        config.attention_pattern = "adaptive"
        config.validate_adaptive_sparse()
    elif config.attention_pattern != "adaptive":
        raise ValueError(
            f"CHECKPOINT: its attention_pattern is {config.attention_pattern!r}, which selects "
            "nothing; --strength 1 shows what it would select"
        )
    tokenizer = load_tokenizer(args.checkpoint)
    model = _load(args.checkpoint, config)
    if args.strength is not None:
        set_selection_strength(model, args.strength)
    device = None if args.cpu else move_to_gpu(model)
    if device is not None:
        sys.stderr.write(f"on {device}\n")
    batch = tokenizer(
        text, return_tensors="pt", truncation=True, max_length=config.max_sequence_length
    )
    batch = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    report = sparsity_report(model, batch)
    length = batch["input_ids"].shape[1]
    sys.stdout.write(
        f"{length} tokens, {report.keys_per_query:.1f} keys per query "
        f"({report.keys_per_query / length:.1%} of all), strength {report.strength:g}\n"
        f"{report.table()}\n"
    )
    if args.json:
        Path(args.json).write_text(json.dumps({"length": length, **report.as_dict()}, indent=2))
    if args.figure:
        save_reading_maps(reading_maps(model, batch), args.figure)
    return 0


def _load(checkpoint: str, config: AdaptiveSparseConfig) -> AdaptiveSparsePreTrainedModel:
    """The checkpoint without its head, causal if it was saved as a causal model."""
    if (config.architectures or [""])[0] == "AdaptiveSparseForCausalLM":
        return load_model(AdaptiveSparseCausalModel, checkpoint, config=config)
    return load_model(AdaptiveSparseModel, checkpoint, config=config, add_pooling_layer=False)


def _read_text(file: str) -> str:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"FILE: {file} is not text in UTF-8") from error
    if not text.strip():
        raise ValueError(f"FILE: {file} is empty")
    return text
