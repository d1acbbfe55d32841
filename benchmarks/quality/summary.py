"""A Markdown table with paired differences, and the figures."""

import itertools
import math
import random
import statistics
from collections.abc import Iterable
from pathlib import Path

from quality.tasks import CHANCE

RESAMPLES = 10_000
REFERENCE = "adaptive"
WHERE = ("near", "far")
LIMITS = ("head_budgets", "head_windows")


def write_summary(folder: Path, name: str, cells: list[dict]) -> str:
    """Writes `name`.md and the figures that the cells are enough for; returns the text."""
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    lines = [_head(cells)]
    for part in ("patterns", "sizes", "ablations", "keys"):
        for task in tasks:
            of_task = [cell for cell in cells if cell["task"] == task]
            lines += _table([cell for cell in of_task if cell["part"] == part], _reference(of_task))
    lines += _length_table([cell for cell in cells if "by_length" in cell])
    lines += _budget_table([cell for cell in cells if cell["part"] == "learned budgets"])
    text = "\n".join(lines) + "\n"
    (folder / f"{name}.md").write_text(text)
    _figure(folder / f"{name}.png", cells, tasks)
    return text


def _head(cells: list[dict]) -> str:
    settings, about = cells[0]["settings"], cells[0]["environment"]
    return (
        f"{settings['length']} tokens per document; {settings['pretraining_steps']} steps of "
        f"pretraining on what is near, {settings['steps']} steps of fine-tuning for every row; "
        "accuracy, and bits per answer after fine-tuning, mean over seeds. Difference: to "
        f"`{REFERENCE}` with the same seed, fine-tuned, on what is far, with the 95 % bootstrap "
        "interval over the seeds. "
        f"{about['device']}, torch {about['torch']}."
    )


def _reference(cells: list[dict]) -> dict[int, float]:
    """What every other variant is compared with, by seed."""
    return {cell["seed"]: _far(cell) for cell in cells if cell.get("variant") == REFERENCE}


def _table(cells: list[dict], reference: dict[int, float]) -> list[str]:
    if not cells:
        return []
    by_name: dict[str, list[dict]] = {}
    for cell in cells:
        by_name.setdefault(cell["variant"], []).append(cell)
    lines = [
        "",
        f"### {cells[0]['part'].capitalize()}: {cells[0]['task']}, "
        f"chance {CHANCE[cells[0]['task']]:.3f}",
        "",
        "| | seeds | keys per query | at once: near | far | fine-tuned: near | far | difference |"
        " router recall | bits, near | bits, far |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, group in by_name.items():
        keys = group[0]["keys_per_query"]
        pairs = [
            _far(cell) - reference[cell["seed"]] for cell in group if cell["seed"] in reference
        ]
        recalls = [cell["router_recall"] for cell in group if "router_recall" in cell]
        row = [
            f"`{name}`" if cells[0]["part"] == "patterns" else name,
            str(len(group)),
            "-" if keys is None else f"{statistics.mean(c['keys_per_query'] for c in group):.0f}",
            *(
                _mean([cell[when][where] for cell in group])
                for when, where in itertools.product(("zero_shot", "finetuned"), WHERE)
            ),
            _interval(pairs) if name != REFERENCE and pairs else "",
            f"{statistics.mean(recalls):.2f}" if recalls else "",
            *(_mean([c["finetuned"].get(f"{where}_bits") for c in group]) for where in WHERE),
        ]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _far(cell: dict) -> float:
    return cell["finetuned"]["far"]


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.3f}" if known else "-"


def _interval(differences: list[float]) -> str:
    mean = statistics.mean(differences)
    if len(differences) == 1:
        return f"{mean:+.3f}"
    draw = random.Random(0)
    means = sorted(
        statistics.mean(draw.choices(differences, k=len(differences))) for _ in range(RESAMPLES)
    )
    low, high = means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES)]
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _length_table(cells: list[dict]) -> list[str]:
    """Accuracy on what is far in documents of other lengths."""
    if not cells:
        return []
    lengths = list(cells[0]["by_length"])
    lines = [
        "",
        "### Documents of other lengths",
        "",
        "Fine-tuned as above; accuracy on what is far, mean over seeds. Where documents have more "
        "than twice as many tokens as candidates, a coarser stage chooses these.",
        "",
        "| task | | seeds | " + " | ".join(f"{int(length):,} tokens" for length in lengths) + " |",
        "|---|---|---|" + "---|" * len(lengths),
    ]
    groups: dict[tuple[str, str], list[dict]] = {}
    for cell in cells:
        groups.setdefault((cell["task"], cell["variant"]), []).append(cell)
    for (task, name), group in sorted(groups.items()):
        values = [_mean([cell["by_length"][length]["far"] for cell in group]) for length in lengths]
        lines.append(f"| {task} | {name} | {len(group)} | " + " | ".join(values) + " |")
    return lines


def _budget_table(cells: list[dict]) -> list[str]:
    if not cells:
        return []
    lines = [
        "",
        f"### Learned budgets at target density {cells[0]['target_density']}",
        "",
        "Blocks that each head may select and tokens it sees to either side, layer by layer. "
        "Shuffled: every head has the budget, gate and window of another. Accuracy on what is far, "
        "of `nearby` on what is near.",
        "",
        "| task | seed | blocks | window | keys per query, of | accuracy | calibrated | shuffled |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        blocks, window = (" ".join(map(str, itertools.chain(*cell[name]))) for name in LIMITS)
        accuracies = (_asked(cell[name]) for name in ("finetuned", "calibrated", "shuffled"))
        lines.append(
            f"| {cell['task']} | {cell['seed']} | {blocks} | {window} | "
            f"{cell['keys_per_query']:.0f}, {cell['full_keys_per_query']:.0f} | "
            + " | ".join(f"{value:.3f}" for value in accuracies)
            + " |"
        )
    between, within = _distances(cells)
    if between and within:
        lines += [
            "",
            "Mean distance of budgets and windows, as shares of the most a head may have, between "
            f"tasks of one seed {statistics.mean(between):.3f}, between seeds of one task "
            f"{statistics.mean(within):.3f}.",
        ]
    return lines


def _asked(accuracy: dict[str, float | None]) -> float:
    """On what is far, or of a task without such questions on what is near."""
    return accuracy["near"] if accuracy["far"] is None else accuracy["far"]


def _shares(cell: dict) -> list[float]:
    """Blocks and windows of the heads, as shares of the most they may have."""
    return [
        value / most
        for name, most in zip(LIMITS, cell["most"], strict=True)
        for value in itertools.chain(*cell[name])
    ]


def _distances(cells: list[dict]) -> tuple[list[float], list[float]]:
    """Euclidean distances between tasks (of one seed) and between seeds (of one task)."""
    between, within = [], []
    for one, other in itertools.combinations(cells, 2):
        distance = math.dist(_shares(one), _shares(other))
        if one["task"] != other["task"] and one["seed"] == other["seed"]:
            between.append(distance)
        if one["task"] == other["task"] and one["seed"] != other["seed"]:
            within.append(distance)
    return between, within


def _figure(file: Path, cells: list[dict], tasks: list[str]) -> bool:
    """One row per task: quality by keys per query, by length, by strength; what heads learned.

    False if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = {}
    for task in tasks:
        of_task = [cell for cell in cells if cell["task"] == task]
        studied = [c for c in of_task if "by_length" in c and c["part"] == "patterns"]
        found = {
            _by_keys: [cell for cell in of_task if cell["part"] == "keys"],
            _by_length: studied,
            _by_strength: [cell for cell in studied if "by_strength" in cell],
            _learned: [cell for cell in of_task if cell["part"] == "learned budgets"],
        }
        if any(found.values()):
            parts[task] = found
    measured = {draw for found in parts.values() for draw, of_draw in found.items() if of_draw}
    draws = [d for d in (_by_keys, _by_length, _by_strength, _learned) if d in measured]
    figure, rows = pyplot.subplots(
        max(len(parts), 1), max(len(draws), 1), squeeze=False, layout="constrained",
        figsize=(4.5 * max(len(draws), 1), 3.8 * max(len(parts), 1)),
    )  # fmt: skip
    for axes, (task, found) in zip(rows, parts.items(), strict=False):
        for axis, draw in zip(axes, draws, strict=True):
            draw(axis, found[draw])
            axis.set_title(f"{task}: {axis.get_title()}")
            axis.set_visible(bool(found[draw]))
            if draw is not _learned:
                axis.axhline(CHANCE[task], color="grey", linestyle=":", linewidth=1)
                far = "accuracy" if draw is _by_strength else "accuracy on what is far"
                axis.set(ylim=(0, 1.02), ylabel=far)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return True


def _means(points: Iterable[tuple[float, float | None]]) -> tuple[list[float], list[float]]:
    """Mean of y for every x, in the order of x; where y is None there is no point."""
    found: dict[float, list[float]] = {}
    for x, y in points:
        if y is not None:
            found.setdefault(x, []).append(y)
    order = sorted(found)
    return order, [statistics.mean(found[x]) for x in order]


def _by_keys(axis, cells: list[dict]) -> None:
    for name in dict.fromkeys(cell["variant"].split(",")[0] for cell in cells):
        groups: dict[str, list[dict]] = {}
        for cell in cells:
            if cell["variant"].split(",")[0] == name:
                groups.setdefault(cell["variant"], []).append(cell)
        keys = [statistics.mean(c["keys_per_query"] for c in group) for group in groups.values()]
        quality = [statistics.mean(map(_far, group)) for group in groups.values()]
        axis.plot(keys, quality, "o-", label=name)
    axis.set(xlabel="keys per query", title="by keys per query")
    if cells:
        axis.legend(fontsize=8)


def _by_length(axis, cells: list[dict]) -> None:
    for name in dict.fromkeys(cell["variant"] for cell in cells):
        group = [cell for cell in cells if cell["variant"] == name]
        values = [(int(n), value) for cell in group for n, value in cell["by_length"].items()]
        axis.plot(*_means((n, value["far"]) for n, value in values), "o-", label=name)
        if name == REFERENCE:
            recall = _means((n, value["router_recall"]) for n, value in values)
            axis.plot(*recall, "x--", color="black", label="router recall of adaptive")
    axis.set(xlabel="tokens", title="by length, same keys per query")
    axis.set_xscale("log", base=2)
    if cells:
        axis.legend(fontsize=8)


def _by_strength(axis, cells: list[dict]) -> None:
    for where in WHERE:
        points = [
            (float(strength), value[where])
            for cell in cells
            for strength, value in cell["by_strength"].items()
        ]
        strengths, means = _means(points)
        if means:
            axis.plot(strengths, means, "o-", label=where)
    axis.set(xlabel="selection strength", title="fine-tuned, by strength")
    if cells:
        axis.legend(fontsize=8)


def _learned(axis, cells: list[dict]) -> None:
    for cell in cells:
        color = f"C{cell['seed']}"
        shares = _shares(cell)
        blocks, windows = shares[: len(shares) // 2], shares[len(shares) // 2 :]
        accuracies = f"{_asked(cell['finetuned']):.2f}, shuffled {_asked(cell['shuffled']):.2f}"
        axis.plot(blocks, "o-", color=color, label=f"seed {cell['seed']}: {accuracies}")
        axis.plot(windows, "x:", color=color)
    axis.set(
        xlabel="head, layer by layer",
        title="learned: blocks (-), window (:)",
        xticks=range(len(_shares(cells[0])) // 2 if cells else 1),
        ylim=(0, 1.1),
    )
    if cells:
        axis.legend(fontsize=8)
