"""What do patterns of attention find in a long document, at equal keys per query?

    python benchmarks/pattern_quality.py --preset ci      # minutes: six patterns, one seed
    python benchmarks/pattern_quality.py --preset full    # hours on two cores; --parts, --seeds
    python benchmarks/pattern_quality.py --preset gpu     # longer documents, a wider model

A small model learns to recall (see quality/tasks.py) with a window and the classification token, on
documents where everything that matters is near. That checkpoint is then taken over by every
pattern, by its configuration alone, and asked about what is far: at once, and after the same short
fine-tuning for all. Every number is the accuracy on documents that no training has seen.

Finished cells are lines of `pattern_quality.jsonl`; a run that was interrupted goes on after them.
"""

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from quality.summary import write_summary
from quality.tasks import TASKS, pretraining_of
from quality.training import (
    accuracy,
    finetune,
    keys_per_query,
    load_variant,
    new_model,
    pretrain,
    report_of,
    selects,
    study_inputs,
)
from quality.variants import (
    ABLATIONS,
    BUDGETS,
    CANDIDATES,
    FEW_PATTERNS,
    PATTERNS,
    SIZES,
    Variant,
)
from side_by_side.measure import environment
from side_by_side.results import add_results_arguments, results_folder

from adaptive_longformer.analysis.sparsity import SparsityReport
from adaptive_longformer.modeling.adaptive_selection import (
    AdaptiveSelection,
    selections,
    set_selection_strength,
)
from adaptive_longformer.training import calibrate

PRESETS = {
    "ci": {
        "length": 1024,
        "tasks": ["recall"],
        "seeds": [0],
        "patterns": FEW_PATTERNS,
        "parts": ["patterns"],
    },
    "full": {"length": 1024, "seeds": [0, 1, 2]},
    "gpu": {
        "length": 4096,
        "tasks": ["recall", "bytes"],
        "seeds": [0, 1, 2],
        "patterns": FEW_PATTERNS,
        "parts": ["patterns"],
        "hidden_size": 256,
        "heads": 4,
    },
}
# What is run, and on which tasks.
PARTS = {
    "patterns": ("recall", "needles", "pairs", "bytes"),
    "sizes": ("recall", "needles", "bytes"),
    "candidates": ("recall", "needles", "bytes"),
    "ablations": ("recall", "table"),
    "keys": ("recall",),
    "learned budgets": ("recall", "nearby"),
}
DEFAULTS = {
    "patterns": tuple(PATTERNS),
    "parts": tuple(PARTS),
    "tasks": TASKS,
    "pretraining_steps": 300,
    "steps": 100,
    "hidden_size": 64,
    "heads": 2,
    "batch_size": 4,
    "documents": 48,
}
STRENGTHS = (0.0, 0.01, 0.1, 0.3, 1.0)
# Looked at more closely: at every length, and "adaptive" at every strength too.
STUDIED = ("adaptive", "random_selection", "longformer")
LENGTHS = (512, 1024, 2048, 4096)
TARGET_DENSITY = 0.35
LEARNED = ("gate", "budget", "span")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="ci")
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--parts", nargs="+", choices=PARTS)
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS)
    parser.add_argument("--pretraining-steps", type=int)
    parser.add_argument("--steps", type=int, help="of every fine-tuning")
    parser.add_argument("--length", type=int, help="tokens per document, 512 to 4096")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--documents", type=int, help="to measure the accuracy on")
    parser.add_argument("--hidden-size", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_results_arguments(parser)
    parser.add_argument("--summary", action="store_true", help="only write table and figures anew")
    args = parser.parse_args()
    for name, value in {**DEFAULTS, **PRESETS[args.preset]}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not 512 <= args.length <= 4096:
        parser.error(f"--length is {args.length}, 512 to 4096 is allowed")
    return args


def pretrained(args: argparse.Namespace, task: str, seed: int) -> Path:
    """The folder of the model that a seed's variants start from; trains it if need be."""
    pretraining = pretraining_of(task)
    name = (
        f"{pretraining}-{args.hidden_size}x{args.heads}-{args.pretraining_steps}-steps-of-"
        f"{args.batch_size * args.length}-tokens-seed-{seed}"
    )
    folder = Path(args.results) / "pretrained" / name
    if folder.exists():
        return folder
    print(f"seed {seed}: learning {pretraining} from what is near", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp(dir=folder.parent)
    sizes = {
        "hidden_size": args.hidden_size,
        "num_attention_heads": args.heads,
        "intermediate_size": 2 * args.hidden_size,
    }
    model = new_model(pretraining, seed, **sizes).to(args.device)
    pretrain(
        model,
        pretraining,
        Path(scratch),
        steps=args.pretraining_steps,
        batch_size=args.batch_size,
        length=args.length,
        seed=seed,
    )
    try:
        os.replace(scratch, folder)
    except OSError:  # somebody else was faster
        shutil.rmtree(scratch)
    return folder


def measure_variant(
    args: argparse.Namespace, task: str, seed: int, variant: Variant, *, is_studied: bool
) -> dict:
    """Accuracy at once and after fine-tuning, keys per query, and what the selection finds."""
    where = {"length": args.length, "seed": seed}
    documents = {"num_documents": args.documents, "seed": seed}
    model = load_variant(pretrained(args, task, seed), variant).to(args.device)
    cell = {"zero_shot": accuracy(model, task, length=args.length, **documents)}
    begin = time.perf_counter()
    finetune(
        model,
        task,
        steps=args.steps,
        batch_size=args.batch_size,
        ramp=not variant.zero_gate,
        **where,
    )
    cell["seconds_per_step"] = (time.perf_counter() - begin) / args.steps
    cell["finetuned"] = accuracy(model, task, length=args.length, **documents)
    if selects(model):
        report = report_of(model, task, **where)
        cell |= {"keys_per_query": report.keys_per_query, **_found(report)}
    else:
        cell["keys_per_query"] = keys_per_query(model, task, **where)
    if not is_studied:
        return cell
    few = {**documents, "num_documents": max(1, args.documents // 4)}
    cell["by_length"] = {}
    for length in LENGTHS:
        at_length = accuracy(model, task, length=length, **few)
        if selects(model):
            at_length |= _found(report_of(model, task, length=length, seed=seed))
        cell["by_length"][length] = at_length
    if variant is PATTERNS["adaptive"]:
        cell["by_strength"] = {}
        for strength in STRENGTHS:
            set_selection_strength(model, strength)
            cell["by_strength"][strength] = accuracy(model, task, length=args.length, **few)
    return cell


def _found(report: SparsityReport) -> dict[str, float]:
    layers = report.layers
    return {
        "router_recall": sum(layer.recall for layer in layers) / len(layers),
        "missed_mass": sum(layer.missed_mass for layer in layers) / len(layers),
    }


def learn_budgets(args: argparse.Namespace, task: str, seed: int) -> dict:
    """Trains with a target density; what every head keeps, and what pruning by it changes."""
    where = {"length": args.length, "seed": seed}
    documents = {**where, "num_documents": args.documents}
    model = load_variant(
        pretrained(args, task, seed), PATTERNS["adaptive"], target_density=TARGET_DENSITY
    ).to(args.device)
    finetune(model, task, steps=args.steps, batch_size=args.batch_size, **where)
    parts = selections(model)
    cell = {
        "target_density": TARGET_DENSITY,
        "density": sum(part.density().item() for part in parts) / len(parts),
        "most": [model.config.num_selected_blocks, parts[0].window.left],
        "finetuned": accuracy(model, task, **documents),
    }
    learned = torch.stack(
        [torch.stack([getattr(part, name).detach() for part in parts]) for name in LEARNED]
    )  # [3, layers, heads]
    _set_learned(parts, learned.flatten(1).roll(1, dims=1).reshape(learned.shape))
    cell["shuffled"] = accuracy(model, task, **documents)
    _set_learned(parts, learned)
    calibration = calibrate(model, [study_inputs(model, task, **where)])
    cell |= dataclasses.asdict(calibration)
    cell["calibrated"] = accuracy(model, task, **documents)
    return cell


@torch.no_grad()
def _set_learned(parts: list[AdaptiveSelection], values: torch.Tensor) -> None:
    for part, of_layer in zip(parts, values.unbind(1), strict=True):
        for name, value in zip(LEARNED, of_layer, strict=True):
            getattr(part, name).copy_(value)


def cells_to_run(args: argparse.Namespace) -> Iterator[tuple[dict, Callable[[], dict]]]:
    """Every cell's name and how it is measured; the same seed is one pair in every comparison."""
    variants = {
        "patterns": {name: PATTERNS[name] for name in args.patterns},
        "sizes": SIZES,
        "candidates": CANDIDATES,
        "ablations": ABLATIONS,
        "keys": BUDGETS,
    }
    for seed in args.seeds:
        for part in args.parts:
            for task in (task for task in PARTS[part] if task in args.tasks):
                where = {"part": part, "task": task, "seed": seed}
                if part == "learned budgets":
                    yield where, lambda task=task, seed=seed: learn_budgets(args, task, seed)
                    continue
                for name, variant in variants[part].items():
                    is_studied = part == "candidates" or (part == "patterns" and name in STUDIED)

                    def measure(task=task, seed=seed, variant=variant, is_studied=is_studied):
                        return measure_variant(args, task, seed, variant, is_studied=is_studied)

                    yield {**where, "variant": name}, measure


def read_cells(file: Path) -> list[dict]:
    """The finished cells; a line that a killed run left half written is not one."""
    cells = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            cells.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return cells


def main() -> int:
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = Path(args.results) if args.summary else results_folder(args)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"pattern_quality_{args.preset}.jsonl"
    settings = {
        name: getattr(args, name)
        for name in (
            "length",
            "pretraining_steps",
            "steps",
            "batch_size",
            "hidden_size",
            "heads",
            "documents",
        )
    }
    done = read_cells(file)
    if file.exists() and not file.read_text().endswith("\n"):
        with file.open("a") as lines:
            lines.write("\n")  # what follows must not continue a half written line
    if any(cell["settings"] != settings for cell in done):
        print(f"{file} holds cells of other settings: move it away first", file=sys.stderr)
        return 2
    about = environment(torch.device(args.device))
    for name, measure in cells_to_run(args) if not args.summary else ():
        if any(name.items() <= cell.items() for cell in done):
            continue
        cell = {**name, **measure(), "settings": settings, "environment": about}
        with file.open("a") as lines:
            lines.write(json.dumps(cell) + "\n")
        print(_one_line(cell), file=sys.stderr, flush=True)
    cells = read_cells(file)
    if not cells:
        print(f"{file} holds no cells yet", file=sys.stderr)
        return 2
    print(write_summary(folder, f"pattern_quality_{args.preset}", cells))
    return 0


def _one_line(cell: dict) -> str:
    name = cell.get("variant", cell["part"])
    line = f"seed {cell['seed']} {cell['task']:>6} {name:<32}"
    for when, said in (("zero_shot", "at once"), ("finetuned", "fine-tuned")):
        for where, value in cell.get(when, {}).items():
            if value is not None and where in ("near", "far"):
                line += f" {said} {value:.2f} {where}"
    return line


if __name__ == "__main__":
    sys.exit(main())
