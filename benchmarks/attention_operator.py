"""The attention operator alone, beside torch's dense attention, side by side.

    python benchmarks/attention_operator.py --preset quick
    python benchmarks/attention_operator.py --check          # only the claimed ratios
    python benchmarks/attention_operator.py --crossover      # up to where dense attention is faster

Every query block of 64 tokens reads a window of 512 tokens and 8 blocks anywhere. Rates count the
tiles of 64 x 64 that a contestant has to execute: two products forward, seven with the backward
pass. Our backends are first compared with the definition. A contestant that fails is named with its
reason, and the others go on. Times are medians of rounds in which every contestant runs once;
memory is the peak of a process of its own above the idle process.
"""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial

import torch
from side_by_side.measure import (
    environment,
    first_line,
    interleaved_medians,
    peak_memory_in_child,
    print_peak_memory,
)
from side_by_side.report import Verdicts, notes, plot, text_table, write_json, write_table
from side_by_side.results import add_results_arguments, results_folder
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from adaptive_longformer.attention.backends.choose import BACKENDS
from adaptive_longformer.attention.call import make_call
from adaptive_longformer.attention.functional import sparse_attention
from adaptive_longformer.patterns.block_layout import BlockLayout, EntryFlag, block_layout
from adaptive_longformer.patterns.sliding_window import SlidingWindow

FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"
PRODUCTS = {FORWARD: 2, FORWARD_BACKWARD: 7}
BLOCK, WINDOW, NUM_SELECTED = 64, 512, 8
DENSE = {
    "cpu": {"sdpa": None},
    "cuda": {
        "sdpa-flash": SDPBackend.FLASH_ATTENTION,
        "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    },
}
OURS = {"cpu": ("cpp", "blocked"), "cuda": ("cuda", "blocked")}
# What --check asks of our first backend.
FASTER = {
    "cpu": {"sdpa": 8.0, "blocked": 1.0},
    "cuda": {"sdpa-flash": 4.0, "blocked": 1.0},
}
RATE = {"cpu": {"sdpa": 0.8}, "cuda": {"sdpa-flash": 0.6}}
SETTINGS = ("heads", "head_dim", "device", "dtype")
LENGTHS = {
    "quick": [2048, 4096],
    "full": [2048, 4096, 8192, 16384],
    "long": [2048, 4096, 8192, 16384, 32768, 65536, 131072],
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=LENGTHS, default="quick")
    parser.add_argument("--lengths", type=int, nargs="+", help="multiples of 64, at least 2048")
    parser.add_argument("--repeats", type=int, help="default: 3 on a CPU, 20 on a GPU")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--heads", type=int, help="default: 2 on a CPU, 12 on a GPU")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--names", nargs="+", help="default: all contestants of the device")
    add_results_arguments(parser)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--check", action="store_true", help="assert the claimed ratios only")
    parser.add_argument(
        "--crossover", action="store_true", help="our backends with a window alone, short inputs"
    )
    parser.add_argument("--memory-cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    on_gpu = args.device.startswith("cuda")
    args.kind = "cuda" if on_gpu else "cpu"
    args.lengths = args.lengths or LENGTHS[args.preset]
    args.repeats = args.repeats or (20 if on_gpu else 3)
    args.heads = args.heads or (12 if on_gpu else 2)
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    args.names = args.names or contestants(args.kind)
    # Shorter ones have too few blocks outside the window.
    if any(length < 2048 or length % BLOCK for length in args.lengths):
        parser.error(f"--lengths is {args.lengths}, multiples of {BLOCK} from 2048 are needed")
    return args


def contestants(kind: str) -> list[str]:
    return [*OURS[kind], *DENSE[kind]]


def routed_layout(length: int, device: torch.device, size: int = BLOCK) -> BlockLayout:
    """A window and `NUM_SELECTED` random blocks outside of it for every query block, in blocks of
    so many tokens.
    """
    window = block_layout(
        SlidingWindow(WINDOW // 2), length, query_block_size=size, key_block_size=size,
        device=device,
    )  # fmt: skip
    num_blocks = window.num_key_blocks
    block = torch.arange(num_blocks)
    rank = torch.rand(num_blocks, num_blocks, generator=torch.Generator().manual_seed(0))
    reach = WINDOW // 2 // size
    rank[(block[:, None] - block).abs() <= reach + 1] = -1.0
    chosen = rank.topk(NUM_SELECTED, dim=1).indices.int().to(device)[None, None]
    flags = torch.full_like(chosen, int(EntryFlag.SELECTED | EntryFlag.FULL))
    joined = replace(
        window,
        key_blocks=torch.cat([window.key_blocks, chosen], dim=-1),
        flags=torch.cat([window.flags, flags], dim=-1),
        counts=torch.full_like(window.counts, window.key_blocks.shape[-1] + NUM_SELECTED),
    )
    is_listed = torch.cat([window.used, torch.ones_like(chosen, dtype=torch.bool)], dim=-1)
    return joined.select(is_listed)


def executed_tiles(name: str, layout: BlockLayout, heads: int) -> int:
    """Tiles of 64 x 64 that a contestant computes."""
    if name.startswith("sdpa"):
        return heads * layout.num_query_blocks * layout.num_key_blocks
    return heads * int(layout.counts.sum())


def make_attention(
    name: str, layout: BlockLayout, dropout: float
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """A contestant as a function of query, key and value."""
    if name.startswith("sdpa"):
        kernel = {**DENSE["cpu"], **DENSE["cuda"]}[name]

        def dense(query, key, value):
            with sdpa_kernel(kernel) if kernel is not None else nullcontext():
                return scaled_dot_product_attention(query, key, value, dropout_p=dropout)

        return dense
    seed = torch.zeros((), dtype=torch.int64, device=layout.counts.device) if dropout else None

    def sparse(query, key, value):
        return sparse_attention(
            query, key, value, layout, dropout_p=dropout, dropout_seed=seed, backend=name
        )

    return sparse


def make_call_of(
    name: str, length: int, dropout: float, mode: str, args: argparse.Namespace, size: int = BLOCK
):
    """A function of no argument that runs a contestant once, in blocks of so many tokens."""
    device = torch.device(args.device)
    attention = make_attention(name, routed_layout(length, device, size), dropout)
    torch.manual_seed(0)
    shape = (1, length, args.heads, args.head_dim)  # as a projection leaves them
    dtype = getattr(torch, args.dtype)
    query, key, value, gradient = (
        torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(4)
    )

    def forward() -> None:
        with torch.no_grad():
            attention(query, key, value)

    def forward_backward() -> None:
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        torch.autograd.grad(attention(*leaves), leaves, gradient)

    return forward if mode == FORWARD else forward_backward


def why_not(name: str, length: int, dropout: float, args: argparse.Namespace) -> str | None:
    """Why a contestant cannot run, or None."""
    if name in DENSE[args.kind]:
        # With dropout SDPA keeps several [heads, length, length] on the CPU.
        needed = 5 * 4 * args.heads * length**2 if args.kind == "cpu" and dropout else 0
        return f"needs about {needed / 2**30:.0f} GiB" if needed > 2**34 else None
    device = torch.device(args.device)
    probe = torch.zeros(
        1, 1, length, args.head_dim, dtype=getattr(torch, args.dtype), device=device
    )
    return BACKENDS[name].unsupported(make_call(probe, probe, probe, routed_layout(length, device)))


def verify(args: argparse.Namespace) -> dict[str, str]:
    """By name what is wrong with those of our backends that differ from the definition."""
    problems = {}
    device, length = torch.device(args.device), 2048
    layout = routed_layout(length, device)
    torch.manual_seed(0)
    exact = [torch.randn(1, 2, length, args.head_dim, dtype=torch.float64) for _ in range(3)]
    expected = sparse_attention(
        *exact, routed_layout(length, torch.device("cpu")), backend="reference"
    )
    for name in OURS[args.kind]:
        if why_not(name, length, 0.0, args) is not None:
            continue
        tensors = [tensor.to(device, getattr(torch, args.dtype)) for tensor in exact]
        try:
            output = sparse_attention(*tensors, layout, backend=name)
            error = ((output.double().cpu() - expected).norm() / expected.norm()).item()
        except RuntimeError as failure:
            problems[name] = first_line(failure)
            continue
        print(f"{name} differs from the definition by {error:.1e}", flush=True)
        if not error < (1e-5 if args.dtype == "float32" else 1e-2):
            problems[name] = f"it is wrong by {error:.1e}"
    for name, problem in problems.items():
        print(f"FAIL {name}: {problem}", flush=True)
    return problems


def time_cells(
    args: argparse.Namespace, modes: tuple[str, ...], problems: dict[str, str]
) -> list[dict]:
    """Cells of all lengths, dropouts, modes and contestants, but for those with a problem."""
    device, cells = torch.device(args.device), []
    for length in args.lengths:
        layout = routed_layout(length, device)
        for dropout in args.dropout:
            for mode in modes:
                where = {"length": length, "dropout": dropout, "mode": mode}
                reasons = {
                    name: problems.get(name) or why_not(name, length, dropout, args)
                    for name in args.names
                }
                # Made at the first use, so that what fails while it is made fails there.
                made = {
                    name: cache(partial(make_call_of, name, length, dropout, mode, args))
                    for name in args.names
                    if reasons[name] is None
                }

                def drop(name: str, error: Exception, reasons=reasons, where=where) -> None:
                    reasons[name] = first_line(error)
                    print(f"{name} failed at {where}: {reasons[name]}", flush=True)

                calls = {name: partial(run_made, make) for name, make in made.items()}
                medians = interleaved_medians(calls, device, args.repeats, drop)
                del calls, made
                for name in args.names:
                    cell = {"name": name, **where}
                    if reasons[name] is not None:
                        cell["why_not"] = reasons[name]
                    else:
                        tiles = executed_tiles(name, layout, args.heads)
                        operations = 2 * PRODUCTS[mode] * tiles * BLOCK**2 * args.head_dim
                        cell["seconds"] = medians[name]
                        cell["operations_per_second"] = operations / medians[name]
                        if mode == FORWARD_BACKWARD and not args.no_memory:
                            cell["memory"] = peak_memory(cell, args)
                    cells.append(cell)
    return cells


def run_made(make: Callable[[], Callable[[], None]]) -> None:
    make()()


def peak_memory(cell: dict, args: argparse.Namespace) -> int | None:
    """Bytes a cell needs at its peak; None if it fails, with the reason printed."""
    settings = {field: getattr(args, field) for field in SETTINGS}
    try:
        return peak_memory_in_child(__file__, {**cell, **settings})
    except RuntimeError as error:
        print(error, flush=True)
        return None


def run_memory_cell(cell: dict) -> None:
    args = argparse.Namespace(**{name: cell[name] for name in SETTINGS})
    print_peak_memory(
        torch.device(args.device),
        lambda: make_call_of(cell["name"], cell["length"], cell["dropout"], cell["mode"], args)(),
    )


def crossover(args: argparse.Namespace, problems: dict[str, str]) -> None:
    """Prints our backends' times for a window of 512 tokens and a global one, by length."""
    device = torch.device(args.device)
    names = tuple(name for name in ("sdpa", *OURS[args.kind]) if name not in problems)
    pattern = SlidingWindow(WINDOW // 2)
    cells = []
    for length in (64, 128, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 2048, 3072):
        shape = (1, length, args.heads, args.head_dim)
        dtype = getattr(torch, args.dtype)
        tensors = [torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(4)]
        is_global = (torch.arange(length, device=device) == 0)[None]

        def tell(name: str, error: Exception, length=length) -> None:
            print(f"{name} failed at {length} tokens: {first_line(error)}", flush=True)

        def forward(name, tensors=tensors, is_global=is_global):
            options = {"global_mask": is_global, "backend": name}
            return sparse_attention(*tensors[:3], pattern, **options)

        def forward_backward(name, tensors=tensors, forward=forward):
            leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
            torch.autograd.grad(forward(name, [*leaves, tensors[3]]), leaves, tensors[3])

        for mode, call in ((FORWARD, forward), (FORWARD_BACKWARD, forward_backward)):
            calls = {name: partial(call, name) for name in names}
            medians = interleaved_medians(calls, device, 5 * args.repeats, tell)
            cells += [
                {"name": name, "length": length, "dropout": 0.0, "mode": mode, "seconds": seconds}
                for name, seconds in medians.items()
            ]
    print(text_table(cells, names))


def check(args: argparse.Namespace, problems: dict[str, str]) -> int:
    """The claims about the operator at 16384 tokens."""
    args.no_memory, args.lengths = True, [16384]
    cells = time_cells(args, (FORWARD_BACKWARD,), problems)
    print(notes(cells))
    ours = OURS[args.kind][0]
    verdicts = Verdicts()
    for dropout in args.dropout:
        found = {cell["name"]: cell for cell in cells if cell["dropout"] == dropout}
        if "why_not" in found[ours]:
            raise SystemExit(f"{ours}: {found[ours]['why_not']}")
        for name, cell in found.items():
            if name == ours or "why_not" in cell:
                continue
            faster = cell["seconds"] / found[ours]["seconds"]
            rate = found[ours]["operations_per_second"] / cell["operations_per_second"]
            about = f"forward+backward, 16384 tokens, dropout {dropout}"
            for what, measured, limit in (
                ("times faster than", faster, FASTER[args.kind].get(name)),
                ("of the rate per executed tile of", rate, RATE[args.kind].get(name)),
            ):
                if limit is not None:
                    verdicts.at_least(f"{ours}, {what} {name}, {about}", measured, limit)
    return int(verdicts.failed or bool(problems))


def main() -> int:
    args = parse_arguments()
    if args.memory_cell:
        run_memory_cell(json.loads(args.memory_cell))
        return 0
    folder = None if args.crossover or args.check else results_folder(args)
    problems = verify(args)
    if args.crossover:
        crossover(args, problems)
        return int(bool(problems))
    if args.check:
        return check(args, problems)
    assert folder is not None
    about = environment(torch.device(args.device))
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {"attention_window": WINDOW, "selected_blocks": NUM_SELECTED, "block_size": BLOCK}
    cells, lengths = [], args.lengths
    for length in lengths:
        # What is written survives a GPU that fails, or whose time is up.
        args.lengths = [length]
        cells += time_cells(args, (FORWARD, FORWARD_BACKWARD), problems)
        write_table(folder / f"attention_operator_{args.kind}.txt", about, cells, tuple(args.names))
        write_json(
            folder / f"attention_operator_{args.kind}.json",
            environment=about,
            settings=settings,
            cells=cells,
        )
    print(text_table(cells, tuple(args.names)))
    print(notes(cells))
    plot(
        folder / f"attention_operator_{args.kind}.png",
        cells,
        tuple(args.names),
        f"The attention operator on {about['device']}",
    )
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
