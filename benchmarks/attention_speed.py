"""How fast is one attention layer, all projections included, beside those of other models?

    python benchmarks/attention_speed.py --preset quick
    python benchmarks/attention_speed.py --check          # only the claimed ratios

Window 512 and one global token where the model has such things; float32, on a GPU autocast to
bfloat16; backward from random gradients. Our layer is first compared with Longformer's on the same
weights, in float32. Times are medians of rounds in which every layer runs once; memory is the peak
of a process of its own, above idle. A contestant that fails is named with its reason.
"""

import argparse
import json
import sys

import torch
from side_by_side.contestants import (
    LAYER_NAMES,
    LONGFORMER,
    OURS,
    Shape,
    build_layer,
    check_layers_agree,
    why_not,
)
from side_by_side.measure import (
    autocast_to,
    default_dtype,
    environment,
    first_line,
    interleaved_medians,
    peak_memory_in_child,
    print_peak_memory,
)
from side_by_side.report import Verdicts, notes, plot, text_table, write_json
from side_by_side.results import add_results_arguments, results_folder

FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"
MODES = (FORWARD, FORWARD_BACKWARD)
PRESETS = {
    "quick": {"lengths": [512, 1024, 2048, 4096], "repeats": 3},
    "full": {"lengths": [512, 1024, 2048, 4096, 8192, 16384], "repeats": 5},
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="quick")
    parser.add_argument("--lengths", type=int, nargs="+", help="multiples of 512")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--names", nargs="+", choices=LAYER_NAMES, default=LAYER_NAMES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="by autocast; default: float32 on a CPU, bfloat16 on a GPU")
    add_results_arguments(parser)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--check", action="store_true", help="assert the claimed ratios only")
    parser.add_argument("--memory-cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.lengths = args.lengths or PRESETS[args.preset]["lengths"]
    args.dtype = args.dtype or default_dtype(args.device)
    args.repeats = args.repeats or PRESETS[args.preset]["repeats"]
    if any(length < 512 or length % 512 for length in args.lengths):
        parser.error(f"--lengths is {args.lengths}, multiples of 512 are needed")
    return args


def make_call(name: str, shape: Shape, dropout: float, mode: str, device: torch.device, dtype: str):
    """A function of no argument that runs the layer once."""
    torch.manual_seed(0)
    layer, call = build_layer(name, shape, dropout, device)
    layer.train()
    hidden = torch.randn(1, shape.length, shape.hidden_size, device=device)
    gradient = torch.randn_like(hidden)

    def forward() -> None:
        with torch.no_grad(), autocast_to(device, dtype):
            call(hidden)

    def forward_backward() -> None:
        leaf = hidden.detach().requires_grad_()
        with autocast_to(device, dtype):
            output = call(leaf)
        output.backward(gradient.to(output.dtype))
        layer.zero_grad()

    return forward if mode == FORWARD else forward_backward


def time_cells(
    args: argparse.Namespace, names: tuple[str, ...], lengths: list[int], modes: tuple[str, ...]
) -> list[dict]:
    """Verify, then time (and measure) every contestant at every length."""
    device = torch.device(args.device)
    cells = []
    for length in lengths:
        shape = Shape(length, hidden_size=args.hidden_size, num_heads=args.heads)
        difference = check_layers_agree(shape, device)
        print(f"length {length}: differs from Longformer by {difference:.1e}", file=sys.stderr)
        for mode in modes:
            for dropout in args.dropout:
                where = {"length": length, "mode": mode, "dropout": dropout}
                reasons = {name: why_not(name, shape, dropout, device) for name in names}
                calls = {
                    name: make_call(name, shape, dropout, mode, device, args.dtype)
                    for name in names
                    if reasons[name] is None
                }

                def drop(name: str, error: Exception, reasons=reasons) -> None:
                    reasons[name] = first_line(error)

                medians = interleaved_medians(
                    calls, device, args.repeats, None if args.check else drop
                )
                for name in names:
                    cell = {"name": name, **where}
                    if reasons[name] is not None:
                        cell["why_not"] = reasons[name]
                    else:
                        cell["seconds"] = medians[name]
                        if mode == FORWARD_BACKWARD and not args.no_memory:
                            fields = ("hidden_size", "heads", "device", "dtype")
                            settings = {field: getattr(args, field) for field in fields}
                            cell["memory"] = peak_memory_in_child(__file__, {**cell, **settings})
                    cells.append(cell)
    return cells


def run_memory_cell(cell: dict) -> None:
    device = torch.device(cell["device"])
    shape = Shape(cell["length"], hidden_size=cell["hidden_size"], num_heads=cell["heads"])
    where = (cell["dropout"], cell["mode"], device, cell["dtype"])
    print_peak_memory(device, lambda: make_call(cell["name"], shape, *where)())


def growth(args: argparse.Namespace, dropout: float) -> float:
    """Time of our layer at 16384 tokens over that at 4096, both in the same rounds."""
    device = torch.device(args.device)
    calls = {}
    for length in (4096, 16384):
        shape = Shape(length, hidden_size=args.hidden_size, num_heads=args.heads)
        calls[str(length)] = make_call(OURS, shape, dropout, FORWARD_BACKWARD, device, args.dtype)
    medians = interleaved_medians(calls, device, args.repeats)
    return medians["16384"] / medians["4096"]


def check(args: argparse.Namespace) -> int:
    """The claims about the attention layer, at every dropout."""
    args.no_memory = True
    pair = (OURS, LONGFORMER)
    cells = time_cells(args, pair, args.lengths, MODES)
    seconds = {
        (cell["name"], cell["length"], cell["mode"], cell["dropout"]): cell["seconds"]
        for cell in cells
    }
    verdicts = Verdicts()
    for dropout in args.dropout:
        for length in args.lengths:
            for mode in MODES:
                ours, theirs = (seconds[name, length, mode, dropout] for name in pair)
                limit = 2.5 if (length, mode) == (4096, FORWARD_BACKWARD) else 1.0
                claim = f"times faster than Longformer, {mode}, {length} tokens, dropout {dropout}"
                verdicts.at_least(claim, theirs / ours, limit)
        verdicts.at_most(f"time(16k) / time(4k), dropout {dropout}", growth(args, dropout), 4.5)
    return int(verdicts.failed)


def main() -> int:
    args = parse_arguments()
    if args.memory_cell:
        run_memory_cell(json.loads(args.memory_cell))
        return 0
    if args.check:
        return check(args)
    folder = results_folder(args)
    names = tuple(args.names)
    about = environment(torch.device(args.device))
    settings = {name: getattr(args, name) for name in ("hidden_size", "heads", "dtype")}
    settings["attention_window"] = 512
    cells = []
    for length in args.lengths:
        cells += time_cells(args, names, [length], MODES)
        write_json(
            folder / "attention_speed.json", environment=about, settings=settings, cells=cells
        )
    print(text_table(cells, names))
    print(notes(cells))
    title = f"One attention layer, {args.hidden_size} wide, on {about['device']}"
    plot(folder / "attention_speed.png", cells, names, title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
