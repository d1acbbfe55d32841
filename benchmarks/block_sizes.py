"""What do query blocks and key blocks of other sizes cost at the same number of keys per query?

    python benchmarks/block_sizes.py
    python benchmarks/block_sizes.py --check     # asserts the claimed ratios, 16384 tokens

Every query block reads a window of 256 tokens each side and 512 tokens in blocks chosen anywhere
else, each with a bias that takes a gradient; the compiled CPU kernel on one thread. Every size is
first compared with the definition, in value and gradient. Sizes take turns within a round; a cell
is the least processor time of all rounds, the median, and the median on the clock. The factor is
the ratio of least processor times to blocks of 64 x 64.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace

import torch
from side_by_side.measure import environment
from side_by_side.report import Verdicts, write_json
from side_by_side.results import add_results_arguments, results_folder

from adaptive_longformer.attention.functional import sparse_attention
from adaptive_longformer.patterns.block_layout import BlockLayout, EntryFlag, block_layout
from adaptive_longformer.patterns.sliding_window import SlidingWindow

WINDOW, CHOSEN_TOKENS, WHOLE = SlidingWindow(256), 512, (64, 64)
SMALL_KEY_BLOCKS, SMALL_QUERY_BLOCKS = 1.3, 1.3
FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"


def chosen_layout(length: int, heads: int, query_block: int, key_block: int) -> BlockLayout:
    """The window's entries, and random blocks that it does not touch as SELECTED ones, by head."""
    window = block_layout(WINDOW, length, query_block_size=query_block, key_block_size=key_block)
    shape = (1, heads, window.num_query_blocks)
    rank = torch.rand(
        *shape, window.num_key_blocks, generator=torch.Generator().manual_seed(query_block)
    )
    # Behind the entries in use lies padding, whose ids count for nothing.
    touched = window.key_blocks.long().where(window.used, window.key_blocks[..., :1].long())
    rank.scatter_(-1, touched.expand(*shape, -1), -1.0)
    chosen = rank.topk(CHOSEN_TOKENS // key_block, dim=-1).indices.int()
    used = window.used.expand(*shape, -1)
    joined = replace(
        window,
        key_blocks=torch.cat([window.key_blocks.expand_as(used), chosen], dim=-1),
        flags=torch.cat(
            [
                window.flags.expand_as(used),
                torch.full_like(chosen, int(EntryFlag.SELECTED | EntryFlag.FULL)),
            ],
            dim=-1,
        ),
        counts=torch.full(shape, used.shape[-1] + chosen.shape[-1], dtype=torch.int32),
    )
    return joined.select(torch.cat([used, torch.ones_like(chosen, dtype=torch.bool)], dim=-1))


class Call:
    """Inputs of one size, and one run of it."""

    def __init__(self, length: int, heads: int, head_dim: int, sizes: tuple[int, int]) -> None:
        self.layout = chosen_layout(length, heads, *sizes)
        generator = torch.Generator().manual_seed(0)
        shape = (1, length, heads, head_dim)  # as a projection leaves them
        *self.rows, self.gradient = (
            torch.randn(shape, generator=generator).transpose(1, 2) for _ in range(4)
        )
        # WINDOW entries take none.
        self.bias = torch.randn(self.layout.key_blocks.shape, generator=generator)

    def run(self, mode: str, backend: str, dtype: torch.dtype = torch.float32):
        """The output; with gradients those of query, key, value and bias."""
        tensors = [tensor.to(dtype) for tensor in (*self.rows, self.bias)]
        if mode == FORWARD:
            with torch.no_grad():
                return self._attend(tensors, backend)
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output = self._attend(leaves, backend)
        return [output, *torch.autograd.grad(output, leaves, self.gradient.to(dtype))]

    def _attend(self, tensors: list[torch.Tensor], backend: str) -> torch.Tensor:
        *rows, bias = tensors
        return sparse_attention(*rows, self.layout, entry_bias=bias, backend=backend)


def verify(args: argparse.Namespace) -> None:
    """Raises unless every size equals the definition."""
    worst = 0.0
    for sizes in args.sizes:
        call = Call(1331, args.heads, args.head_dim, sizes)
        actual = call.run(FORWARD_BACKWARD, "cpp")
        expected = call.run(FORWARD_BACKWARD, "reference", torch.float64)
        for name, one, other in zip(("output", "query", "key", "value", "bias"), actual, expected):
            error = ((one.double() - other).norm() / other.norm()).item()
            worst = max(worst, error)
            if not error < 1e-5:
                raise SystemExit(f"blocks of {sizes}: {name} is wrong by {error:.1e}")
    print(f"all sizes differ from the definition by at most {worst:.1e}", flush=True)


def time_cells(length: int, mode: str, args: argparse.Namespace) -> list[dict]:
    calls = {sizes: Call(length, args.heads, args.head_dim, sizes) for sizes in args.sizes}
    samples: dict[tuple[int, int], list[tuple[float, float]]] = {sizes: [] for sizes in calls}
    for _ in range(args.repeats + 1):
        for sizes, call in calls.items():
            begin = time.process_time(), time.perf_counter()
            call.run(mode, "cpp")
            samples[sizes].append((time.process_time() - begin[0], time.perf_counter() - begin[1]))
    cells = []
    for (query_block, key_block), call in calls.items():
        processor, clock = zip(*samples[query_block, key_block][1:])
        keys = call.layout.counts.float().mean().item() * key_block
        cells.append(
            {"length": length, "mode": mode, "query_block": query_block, "key_block": key_block,
             "keys_per_query": keys, "least_cpu_seconds": min(processor),
             "cpu_seconds": statistics.median(processor), "seconds": statistics.median(clock)}
        )  # fmt: skip
    whole = {(cell["query_block"], cell["key_block"]): cell for cell in cells}.get(WHOLE)
    for cell in cells:
        if whole is not None:
            cell["factor"] = cell["least_cpu_seconds"] / whole["least_cpu_seconds"]
    return cells


def print_table(cells: list[dict]) -> None:
    first = cells[0]
    print(f"\n{first['mode']}, {first['length']} tokens (ms)")
    print(f"{'blocks':>8} {'keys':>6} {'least':>8} {'median':>8} {'clock':>8} {'factor':>7}")
    for cell in cells:
        times = (cell[name] for name in ("least_cpu_seconds", "cpu_seconds", "seconds"))
        print(
            f"{cell['query_block']:>4}x{cell['key_block']:<3} {cell['keys_per_query']:>6.0f} "
            + " ".join(f"{1000 * value:>8.1f}" for value in times)
            + f" {cell.get('factor', float('nan')):>7.2f}",
            flush=True,
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--query-blocks", type=int, nargs="+", default=[64, 32, 16])
    parser.add_argument("--key-blocks", type=int, nargs="+", default=[64, 32, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    add_results_arguments(parser)
    parser.add_argument("--check", action="store_true", help="assert the claimed ratios")
    args = parser.parse_args()
    # Shorter ones have too few blocks outside the window.
    if any(length < 1280 for length in args.lengths):
        parser.error(f"--lengths is {args.lengths}, at least 1280 is needed")
    if args.check:
        args.lengths = [16384]
    args.sizes = [(query, key) for query in args.query_blocks for key in args.key_blocks]
    return args


def main() -> int:
    args = parse_arguments()
    folder = None if args.check else results_folder(args)
    torch.set_num_threads(args.threads)
    verify(args)
    cells = []
    for length in args.lengths:
        for mode in (FORWARD, FORWARD_BACKWARD):
            cells += time_cells(length, mode, args)
            print_table(cells[-len(args.sizes) :])
    if folder is not None:
        about = environment(torch.device("cpu"))
        settings = {name: getattr(args, name) for name in ("heads", "head_dim", "repeats")}
        settings |= {"window": WINDOW.width, "chosen_tokens": CHOSEN_TOKENS}
        write_json(folder / "block_sizes.json", environment=about, settings=settings, cells=cells)
        return 0
    verdicts = Verdicts()
    for cell in cells:
        sizes = cell["query_block"], cell["key_block"]
        about = f"{sizes[0]}x{sizes[1]} / 64x64, {cell['mode']}, {cell['length']} tokens"
        if "factor" in cell and sizes != WHOLE and 64 in sizes:
            limit = SMALL_KEY_BLOCKS if sizes[0] == 64 else SMALL_QUERY_BLOCKS
            verdicts.at_most(about, cell["factor"], limit)
    return int(verdicts.failed)


if __name__ == "__main__":
    sys.exit(main())
