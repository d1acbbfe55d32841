"""The command `adaptive-longformer summarize`."""

import argparse
import sys

from adaptive_longformer.command_inputs import (
    load_model,
    load_tokenizer,
    read_document,
    saved_heads,
    silence_transformers,
)
from adaptive_longformer.inference.summarization import summarize
from adaptive_longformer.modeling.modeling_adaptive_sparse_seq2seq import (
    AdaptiveSparseForConditionalGeneration,
)
from adaptive_longformer.progress_line import ProgressLine


def run(args: argparse.Namespace) -> int:
    """Summarise and print the summary on stdout; everything else goes to stderr."""
    silence_transformers()
    if args.num_beams is not None and args.num_beams < 1:
        raise ValueError(f"--num-beams: {args.num_beams} is not allowed, give 1 or more")
    options = {} if args.num_beams is None else {"num_beams": args.num_beams}
    text = read_document(args.file)
    heads = saved_heads(args.model)
    if heads and not any(head.endswith("ForConditionalGeneration") for head in heads):
        raise ValueError(
            f"{args.model}, saved as {heads[0]}, writes no text: an encoder-decoder that was "
            "trained to summarise is needed (examples/finetune_summarization.py trains one)"
        )
    model_class = AdaptiveSparseForConditionalGeneration
    model = load_model(model_class, args.model, use_gpu=not args.cpu)
    tokenizer = load_tokenizer(args.model)
    with ProgressLine() as progress:
        summary = summarize(
            model, tokenizer, text, max_new_tokens=args.max_new_tokens, progress=progress, **options
        )
    if not summary.is_of_the_whole_document:
        sys.stderr.write(
            f"note: the model read the first {summary.num_tokens_read:,} of the document's "
            f"{summary.num_tokens:,} tokens\n"
        )
    sys.stdout.write(summary.text + "\n")
    return 0
