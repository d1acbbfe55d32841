"""What does choosing blocks cost beside the attention that reads them?

    python benchmarks/selection_speed.py              # 16384 tokens
    python benchmarks/selection_speed.py --check      # 16384 and 65536, asserts the claims

Window 512, one global token, 512 keys in chosen blocks, 12 heads of 64; float32, bfloat16 on a GPU;
a document whose keys share topics with their neighbours. "selection" is the choice and the list,
"forward" the attention over window, global token and chosen blocks with these lists, "adaptive"
the same forward and backward, gradients of the weights of the entries and of the window included.
"window" is "adaptive" without chosen blocks.
"""

import argparse
import sys
from dataclasses import asdict

import torch
from selection_recall import SCALES
from side_by_side.measure import default_dtype, environment, interleaved_medians
from side_by_side.report import Verdicts, write_json
from side_by_side.results import add_results_arguments, results_folder

from adaptive_longformer.attention import AttentionSpan, sparse_attention
from adaptive_longformer.patterns import SlidingWindow
from adaptive_longformer.selection.lists import selection_layout
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.selection.select_blocks import select_blocks

WINDOW, OPTIONS = SlidingWindow(256), SelectionOptions()


def document(length: int, args: argparse.Namespace, device: torch.device):
    """Queries, keys and values of a document, [1, heads, length, head_dim]."""
    generator, heads, head_dim = torch.Generator().manual_seed(length), args.heads, args.head_dim
    topic = torch.zeros(heads, length, head_dim)
    for scale in SCALES:
        drawn = torch.randn(heads, -(-length // scale), head_dim, generator=generator) * 0.5
        topic += drawn.repeat_interleave(scale, dim=1)[:, :length]
    noise = torch.randn(3, heads, length, head_dim, generator=generator)
    query, key, value = noise[0] + 0.5 * topic, topic + 0.5 * noise[1], noise[2]
    dtype = getattr(torch, args.dtype)
    return [tensor[None].to(device, dtype).requires_grad_() for tensor in (query, key, value)]


def calls_of(length: int, args: argparse.Namespace, device: torch.device) -> dict:
    """Functions of no argument, by name."""
    query, key, value = document(length, args, device)
    gradient = torch.randn_like(query)
    global_mask = torch.zeros(1, length, dtype=torch.bool, device=device)
    global_mask[:, 0] = True
    gate = torch.ones(args.heads, 1, 1, device=device, requires_grad=True)
    span = torch.full((args.heads,), 256.0, device=device, requires_grad=True)

    def selection():
        selected = select_blocks(query, key, WINDOW, OPTIONS, global_mask=global_mask)
        return selection_layout(selected, WINDOW, length, OPTIONS)

    layout, slots = selection()

    def attend() -> torch.Tensor:
        entry_bias = gate.log() * (slots > 0)
        return sparse_attention(
            query, key, value, layout, global_mask=global_mask, entry_bias=entry_bias,
            span=AttentionSpan(span, 32.0),
        )  # fmt: skip

    def forward() -> None:
        with torch.no_grad():
            attend()

    def adaptive() -> None:
        attend().backward(gradient)

    def window() -> None:
        sparse_attention(query, key, value, WINDOW, global_mask=global_mask).backward(gradient)

    calls = (selection, forward, adaptive, window)
    return {call.__name__: call for call in calls}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="default: float32 on a CPU, bfloat16 on a GPU")
    add_results_arguments(parser)
    parser.add_argument("--check", action="store_true", help="assert the claims at 16k and 64k")
    args = parser.parse_args()
    args.dtype = args.dtype or default_dtype(args.device)
    folder = None if args.check else results_folder(args)
    lengths = [16384, 65536] if args.check else args.lengths
    device = torch.device(args.device)
    calls = {
        f"{name} {length}": call
        for length in lengths
        for name, call in calls_of(length, args, device).items()
    }
    medians = interleaved_medians(calls, device, args.repeats)
    cells = []
    for length in lengths:
        names = ("selection", "forward", "adaptive", "window")
        cell = {name: medians[f"{name} {length}"] for name in names}
        cell["share"] = cell["selection"] / cell["adaptive"]
        cell["of_forward"] = cell["selection"] / cell["forward"]
        cells.append({"length": length, **cell})
        print(
            f"{length:>7} tokens: selection {cell['selection']:.3f} s, adaptive attention forward "
            f"and backward {cell['adaptive']:.3f} s ({cell['share']:.1%}), window only "
            f"{cell['window']:.3f} s\n"
            f"        adaptive attention forward, given lists {cell['forward']:.3f} s: selection "
            f"/ forward {cell['of_forward']:.1%}, selection / (selection + forward) "
            f"{cell['selection'] / (cell['selection'] + cell['forward']):.1%}"
        )
    if folder is not None:
        settings = {name: getattr(args, name) for name in ("heads", "head_dim", "dtype")}
        settings |= {"window": 512, **asdict(OPTIONS)}
        path = folder / "selection_speed.json"
        write_json(path, environment=environment(device), settings=settings, cells=cells)
        return 0
    verdicts = Verdicts()
    verdicts.at_most(
        "selection / adaptive attention forward+backward, 16k tokens", cells[0]["share"], 0.30
    )
    verdicts.at_most(
        "selection / adaptive attention forward, 16k tokens", cells[0]["of_forward"], 0.60
    )
    whole = [cell["selection"] + cell["adaptive"] for cell in cells]
    verdicts.at_most("time(64k) / time(16k), selection and attention", whole[1] / whole[0], 4.6)
    return int(verdicts.failed)


if __name__ == "__main__":
    sys.exit(main())
