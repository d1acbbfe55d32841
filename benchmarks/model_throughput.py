"""How fast does a whole encoder read and train, and how much memory does it take?

    python benchmarks/model_throughput.py --preset quick
    python benchmarks/model_throughput.py --check          # only the claimed ratios

Random weights, the same width and depth, float32, on a GPU autocast to bfloat16, one document at a
time; backward from random gradients; a training step adds AdamW. Our model is first compared with
the Longformer it is converted from, in float32. Times are medians of rounds in which every model
runs once; memory is the peak of a process of its own, weights included, above the idle process. A
contestant that fails is named with its reason.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from side_by_side.contestants import (
    BIG_BIRD,
    FAMILIES,
    LED,
    LONGFORMER,
    NAMES,
    OURS,
    ROBERTA,
    Shape,
    build_model,
    check_models_agree,
    model_inputs,
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

from adaptive_longformer.attention.backends.choose import cpp_is_automatic

FORWARD, FORWARD_BACKWARD, TRAINING_STEP = "forward", "forward+backward", "training step"
MODES = (FORWARD, FORWARD_BACKWARD, TRAINING_STEP)
ALL_NAMES = tuple(dict.fromkeys((*NAMES, *(name for pair in FAMILIES for name in pair))))
PRESETS = {
    "quick": {
        "lengths": [512, 1024, 2048, 4096],
        "repeats": 3,
        "hidden_size": 256,
        "heads": 4,
        "layers": 2,
    },
    "full": {
        "lengths": [512, 1024, 2048, 4096, 8192, 16384],
        "repeats": 3,
        "hidden_size": 384,
        "heads": 6,
        "layers": 2,
    },
    # The size of longformer-base, for --check.
    "base": {
        "lengths": [512, 1024, 2048, 4096],
        "repeats": 3,
        "hidden_size": 768,
        "heads": 12,
        "layers": 12,
    },
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, help="default: quick, with --check base")
    parser.add_argument("--lengths", type=int, nargs="+", help="multiples of 512")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--hidden-size", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=[FORWARD, FORWARD_BACKWARD])
    parser.add_argument("--names", nargs="+", choices=ALL_NAMES, default=NAMES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="by autocast; default: float32 on a CPU, bfloat16 on a GPU")
    add_results_arguments(parser)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--check", action="store_true", help="assert the claimed ratios only")
    parser.add_argument("--memory-cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtype = args.dtype or default_dtype(args.device)
    for name, value in PRESETS[args.preset or ("base" if args.check else "quick")].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if any(length < 512 or length % 512 for length in args.lengths):
        parser.error(f"--lengths is {args.lengths}, multiples of 512 are needed")
    return args


def shape_of(args: argparse.Namespace, length: int) -> Shape:
    return Shape(length, hidden_size=args.hidden_size, num_heads=args.heads, num_layers=args.layers)


def make_call(name: str, shape: Shape, dropout: float, mode: str, device: torch.device, dtype: str):
    """A function of no argument that runs the model once."""
    torch.manual_seed(0)
    model = build_model(name, shape, dropout).to(device)
    model.train(mode != FORWARD)
    inputs = model_inputs(name, shape, 1, device)
    gradient = torch.randn(1, shape.length, shape.hidden_size, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5) if mode == TRAINING_STEP else None

    def forward() -> None:
        with torch.no_grad(), autocast_to(device, dtype):
            model(**inputs)

    def forward_backward() -> None:
        with autocast_to(device, dtype):
            output = model(**inputs).last_hidden_state
        output.backward(gradient.to(output.dtype))
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()

    return forward if mode == FORWARD else forward_backward


def time_cells(
    args: argparse.Namespace,
    names: tuple[str, ...],
    lengths: list[int],
    modes: list[str],
    *,
    memory: bool = False,
) -> list[dict]:
    """Time (and measure) every contestant at every length."""
    device = torch.device(args.device)
    cells = []
    for length in lengths:
        shape = shape_of(args, length)
        for mode in modes:
            # Dropout changes nothing in a forward pass without training.
            for dropout in args.dropout if mode != FORWARD else args.dropout[:1]:
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
                del calls
                for name in names:
                    cell = {"name": name, "length": length, "mode": mode, "dropout": dropout}
                    if reasons[name] is not None:
                        cell["why_not"] = reasons[name]
                    else:
                        cell["seconds"] = medians[name]
                        if memory and mode == FORWARD_BACKWARD:
                            cell["memory"] = memory_of(args, cell)
                    cells.append(cell)
                print(f"done: {mode}, length {length}, dropout {dropout}", file=sys.stderr)
    return cells


def memory_of(args: argparse.Namespace, cell: dict) -> int | None:
    fields = ("hidden_size", "heads", "layers", "device", "dtype")
    settings = {name: getattr(args, name) for name in fields}
    return peak_memory_in_child(__file__, {**cell, **settings})


def run_memory_cell(cell: dict) -> None:
    args = argparse.Namespace(**cell)
    device, shape = torch.device(args.device), shape_of(args, args.length)
    where = (args.dropout, args.mode, device, args.dtype)
    print_peak_memory(device, lambda: make_call(args.name, shape, *where)())


def verify(args: argparse.Namespace) -> None:
    """Compare with Longformer at the shortest length that has a far key, and at an even shorter
    one."""
    with tempfile.TemporaryDirectory() as scratch:
        for length in (512, 2048):
            folder = Path(scratch) / str(length)
            shape = shape_of(args, length)
            difference = check_models_agree(shape, folder, torch.device(args.device))
            print(f"length {length}: differs from Longformer by {difference:.1e}", file=sys.stderr)


def growth(args: argparse.Namespace, dropout: float) -> float:
    """Time of our training step at 16384 tokens over that at 4096, both in the same rounds."""
    device = torch.device(args.device)
    calls = {
        str(length): make_call(
            OURS, shape_of(args, length), dropout, TRAINING_STEP, device, args.dtype
        )
        for length in (4096, 16384)
    }
    medians = interleaved_medians(calls, device, args.repeats)
    return medians["16384"] / medians["4096"]


def check(args: argparse.Namespace) -> int:
    """The claims about the whole model, at every dropout."""
    limits = (2.5, 2.5, 0.5) if cpp_is_automatic() else (1.7, 1.8, 0.6)
    faster, encoder_faster, memory = limits
    pair = (OURS, LONGFORMER)
    modes = [FORWARD, TRAINING_STEP]
    verdicts = Verdicts()
    cells = time_cells(args, pair, args.lengths, modes)
    cells += time_cells(args, (OURS, ROBERTA), [512], modes)
    for mode in modes:
        for dropout in args.dropout if mode != FORWARD else args.dropout[:1]:
            block = [c for c in cells if (c["mode"], c["dropout"]) == (mode, dropout)]
            what = f"{mode}, dropout {dropout}"
            for length in args.lengths:
                # The first cell of a name is the one timed side by side with Longformer.
                ours, theirs = (_first(block, name, length) for name in pair)
                limit = faster if (length, mode) == (4096, TRAINING_STEP) else 1.0
                claim = f"times faster than Longformer, {length} tokens, {what}"
                verdicts.at_least(claim, theirs / ours, limit)
            ratio = _last(block, OURS, 512) / _first(block, ROBERTA, 512)
            verdicts.at_most(f"time / RoBERTa-SDPA's, 512 tokens, {what}", ratio, 1.2)
            if mode == TRAINING_STEP:
                verdicts.at_most(f"time(16k) / time(4k), {what}", growth(args, dropout), 4.5)
    claims = {LONGFORMER: TRAINING_STEP, BIG_BIRD: FORWARD_BACKWARD, LED: FORWARD_BACKWARD}
    for ours, theirs in FAMILIES:
        mode = claims[theirs]
        if theirs != LONGFORMER:
            cells = time_cells(args, (ours, theirs), [4096], [mode])
        for dropout in args.dropout:
            where = {"length": 4096, "mode": mode, "dropout": dropout}
            what = f"4096 tokens, {mode}, dropout {dropout}"
            if theirs != LONGFORMER:
                block = [cell for cell in cells if cell["dropout"] == dropout]
                ratio = _first(block, theirs, 4096) / _first(block, ours, 4096)
                verdicts.at_least(f"times faster than {theirs}, {what}", ratio, encoder_faster)
            ratio = _peak(args, ours, where) / _peak(args, theirs, where)
            verdicts.at_most(f"peak memory / {theirs}'s, {what}", ratio, memory)
    return int(verdicts.failed)


def _peak(args: argparse.Namespace, name: str, where: dict) -> int:
    peak = memory_of(args, {"name": name, **where})
    if peak is None:
        raise RuntimeError(f"the machine has too little memory for {name}: {where}")
    return peak


def _first(cells: list[dict], name: str, length: int) -> float:
    return next(c["seconds"] for c in cells if (c["name"], c["length"]) == (name, length))


def _last(cells: list[dict], name: str, length: int) -> float:
    return _first(cells[::-1], name, length)


def main() -> int:
    args = parse_arguments()
    if args.memory_cell:
        run_memory_cell(json.loads(args.memory_cell))
        return 0
    if args.check:
        verify(args)
        return check(args)
    folder = results_folder(args)
    verify(args)
    names = tuple(args.names)
    about = environment(torch.device(args.device))
    settings = {
        "hidden_size": args.hidden_size,
        "heads": args.heads,
        "layers": args.layers,
        "dtype": args.dtype,
        "attention_window": 512,
        "batch_size": 1,
    }
    cells = []
    for length in args.lengths:
        cells += time_cells(args, names, [length], args.modes, memory=not args.no_memory)
        write_json(
            folder / "model_throughput.json", environment=about, settings=settings, cells=cells
        )
    print(text_table(cells, names))
    print(notes(cells))
    title = f"{args.layers} layers, {args.hidden_size} wide, on {about['device']}"
    plot(folder / "model_throughput.png", cells, names, title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
