"""How many documents per second does an encoder embed?

    python benchmarks/embedding_throughput.py
    python benchmarks/embedding_throughput.py --lengths 512 4096 --layers 12 --hidden-size 768 \
        --heads 12

Random weights, the same width and depth, float32, inference: the mean of the hidden states, divided
by its norm. Our model is first compared with the Longformer it is converted from. "first 512
tokens" is RoBERTa with SDPA on what a model of 512 tokens keeps of a document. Batches of 8192
tokens, or of one document. Medians of rounds in which every model runs once, in one process: on a
busy machine the ratios say more than the numbers.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from side_by_side.contestants import (
    LONGFORMER,
    OURS,
    ROBERTA,
    Shape,
    build_model,
    check_models_agree,
    model_inputs,
)
from side_by_side.measure import environment, first_line, interleaved_medians
from side_by_side.report import write_json
from side_by_side.results import add_results_arguments, results_folder

TRUNCATING, MODERNBERT = "first 512 tokens", "modernbert-sdpa"
NAMES = (OURS, LONGFORMER, MODERNBERT, TRUNCATING)
KEPT, TOKENS_PER_BATCH = 512, 8192


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Documents per second of embedding models.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096, 16384])
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    add_results_arguments(parser, "benchmarks/results")
    return parser.parse_args(argv)


def shape_of(args: argparse.Namespace, length: int) -> Shape:
    return Shape(length, args.hidden_size, args.layers, args.heads)


def make_call(args: argparse.Namespace, name: str, length: int) -> Callable[[], object]:
    """Embeds one batch of documents of so many tokens."""
    device = torch.device(args.device)
    batch_size = max(1, TOKENS_PER_BATCH // length)
    kind, read = (ROBERTA, min(length, KEPT)) if name == TRUNCATING else (name, length)
    shape = shape_of(args, read)
    model = build_model(kind, shape, dropout=0.0).to(device).eval()
    inputs = model_inputs(kind, shape, batch_size, device)

    @torch.inference_mode()
    def embed() -> torch.Tensor:
        mean = model(**inputs).last_hidden_state.mean(dim=1)
        return torch.nn.functional.normalize(mean, dim=-1)

    return embed


def main() -> None:
    args = parse_arguments()
    folder = results_folder(args)
    device = torch.device(args.device)
    about = environment(device)
    with tempfile.TemporaryDirectory() as scratch:
        difference = check_models_agree(shape_of(args, 1100), Path(scratch), device)
    print(f"differs from Longformer by {difference:.1e}", file=sys.stderr)
    cells = []

    def fail(name: str, error: Exception) -> None:
        print(f"{name}: {first_line(error)}", file=sys.stderr)

    for length in args.lengths:
        calls = {name: make_call(args, name, length) for name in NAMES}
        medians = interleaved_medians(calls, device, args.repeats, fail)
        batch_size = max(1, TOKENS_PER_BATCH // length)
        for name, seconds in medians.items():
            cell = {"name": name, "length": length, "documents_per_second": batch_size / seconds}
            cells.append(cell)
            print(f"{length:>6}  {name:<18} {batch_size / seconds:8.2f} documents/s", flush=True)
    settings = {"hidden_size": args.hidden_size, "heads": args.heads, "layers": args.layers}
    write_json(
        folder / "embedding_throughput.json", environment=about, settings=settings, cells=cells
    )


if __name__ == "__main__":
    main()
