"""The command `adaptive-longformer report`."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig

from adaptive_longformer.analysis.reading_map import (
    reading_maps,
    save_reading_maps,
)
from adaptive_longformer.analysis.sparsity import LEGEND, sparsity_report
from adaptive_longformer.command_inputs import (
    load_model,
    load_tokenizer,
    read_document,
    silence_transformers,
)
from adaptive_longformer.configuration.configuration_adaptive_sparse import AdaptiveSparseConfig
from adaptive_longformer.configuration.configuration_adaptive_sparse_seq2seq import (
    AdaptiveSparseSeq2SeqConfig,
)
from adaptive_longformer.modeling.adaptive_selection import set_selection_strength
from adaptive_longformer.modeling.modeling_adaptive_sparse import (
    AdaptiveSparseModel,
    AdaptiveSparsePreTrainedModel,
)
from adaptive_longformer.modeling.modeling_adaptive_sparse_causal import (
    AdaptiveSparseCausalModel,
)


def run(args: argparse.Namespace) -> int:
    """Run the checkpoint on the document and print what its layers read."""
    silence_transformers()
    text = read_document(args.file)
    config = AutoConfig.from_pretrained(args.model)
    if isinstance(config, AdaptiveSparseSeq2SeqConfig):
        raise ValueError(
            f"MODEL: {args.model} is an encoder-decoder, an encoder or a causal model is needed"
        )
    if not isinstance(config, AdaptiveSparseConfig):
        raise ValueError(
            f"MODEL: {args.model} is a {config.model_type} checkpoint; convert it first: "
            f"adaptive-longformer convert {args.model} TARGET"
        )
    if args.strength is not None:
        config.attention_pattern = "adaptive"
        config.validate_adaptive_sparse()
    elif config.attention_pattern != "adaptive":
        raise ValueError(
            f"MODEL: its attention_pattern is {config.attention_pattern!r}, which selects "
            "nothing; --strength 1 shows what it would select"
        )
    tokenizer = load_tokenizer(args.model)
    model = _load(args, config)
    if args.strength is not None:
        set_selection_strength(model, args.strength)
    batch = tokenizer(
        text, return_tensors="pt", truncation=True, max_length=config.max_sequence_length
    )
    batch = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    report = sparsity_report(model, batch)
    length = batch["input_ids"].shape[1]
    sys.stdout.write(
        f"{length} tokens, {report.keys_per_query:.1f} keys per query "
        f"({report.keys_per_query / length:.1%} of all), strength {report.strength:g}\n"
        f"{report.table()}\n\n{LEGEND}\n"
    )
    period = config.repeated_length
    maps = reading_maps(model, batch) if period or args.figure else []
    numbers = {"length": length, **report.as_dict()}
    if period:
        shares = [reads.share_at_multiples(period) for reads in maps]
        numbers |= {"repeated_length": period, "selected_at_multiples": shares}
        every = replace(maps[0], selected=torch.ones_like(maps[0].selected))
        sys.stdout.write(
            f"\npositions repeat after {period} tokens, the length of the source\n"
            f"selected blocks at its multiples, by layer: "
            f"{', '.join(f'{share:.0%}' for share in shares)} "
            f"({every.share_at_multiples(period):.0%} of all blocks are there)\n"
        )
    if args.json:
        Path(args.json).write_text(json.dumps(numbers, indent=2))
    if args.figure:
        name = "standard input" if args.file == "-" else Path(args.file).name
        title = f"What {Path(args.model).name} reads in {name} ({length} tokens)"
        save_reading_maps(maps, args.figure, title, period)
    return 0


def _load(args: argparse.Namespace, config: AdaptiveSparseConfig) -> AdaptiveSparsePreTrainedModel:
    """The checkpoint without its head, causal if it was saved as a causal model."""
    options = {"config": config, "use_gpu": not args.cpu}
    if (config.architectures or [""])[0] == "AdaptiveSparseForCausalLM":
        return load_model(AdaptiveSparseCausalModel, args.model, **options)
    return load_model(AdaptiveSparseModel, args.model, add_pooling_layer=False, **options)
