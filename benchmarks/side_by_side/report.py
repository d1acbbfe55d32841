"""A table on the terminal, JSON and a plot in a folder, and verdicts on claimed ratios."""

import json
from pathlib import Path


def text_table(cells: list[dict], names: tuple[str, ...]) -> str:
    """One block of rows for each mode and dropout: milliseconds and MiB by length and contestant.

    Args:
        cells: Dicts with name, length, mode, dropout and either seconds (and memory) or why_not.
        names: The contestants, in the order of the columns.
    """
    texts = [_text(cell) for cell in cells]
    width = 2 + max(22, *(len(text) for text in (*texts, *names)))
    lines = []
    for mode, dropout in dict.fromkeys((cell["mode"], cell["dropout"]) for cell in cells):
        block = [cell for cell in cells if (cell["mode"], cell["dropout"]) == (mode, dropout)]
        lines += ["", f"{mode}, dropout {dropout} (milliseconds, MiB at the peak)"]
        lines.append(f"{'length':>8}" + "".join(f"{name:>{width}}" for name in names))
        for length in dict.fromkeys(cell["length"] for cell in block):
            found = {cell["name"]: cell for cell in block if cell["length"] == length}
            row = "".join(f"{_text(found.get(name)):>{width}}" for name in names)
            lines.append(f"{length:>8}{row}")
    return "\n".join(lines)


def _text(cell: dict | None) -> str:
    if cell is None or "seconds" not in cell:
        return "-"
    milliseconds = 1000 * cell["seconds"]
    text = f"{milliseconds:,.0f} ms" if milliseconds >= 10 else f"{milliseconds:.2f} ms"
    if cell.get("memory") is not None:
        text += f" {cell['memory'] / 2**20:,.0f} MiB"
    if "operations_per_second" in cell:
        text += f" {cell['operations_per_second'] / 1e9:,.0f} GFLOP/s"
    return text


def notes(cells: list[dict]) -> str:
    """Why some cells are empty, one line for each reason."""
    reasons: dict[str, set[int]] = {}
    for cell in cells:
        if "why_not" in cell:
            reasons.setdefault(f"{cell['name']}: {cell['why_not']}", set()).add(cell["length"])
    return "\n".join(
        f"- {reason} (length {', '.join(map(str, sorted(lengths)))})"
        for reason, lengths in reasons.items()
    )


def write_json(file: Path, **content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")


def write_table(file: Path, environment: dict, cells: list[dict], names: tuple[str, ...]) -> None:
    """What `text_table` and `notes` say of the cells, below a line about the environment."""
    about = ", ".join(f"{name} {value}" for name, value in environment.items())
    parts = (about, text_table(cells, names), notes(cells))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(part for part in parts if part) + "\n")


def plot(file: Path, cells: list[dict], names: tuple[str, ...], title: str) -> bool:
    """Time by length, one panel for each mode and dropout; False if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((cell["mode"], cell["dropout"]) for cell in cells))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 4), squeeze=False)
    for axis, panel in zip(axes[0], panels):
        for name in names:
            points = sorted(
                (cell["length"], cell["seconds"])
                for cell in cells
                if cell["name"] == name
                and (cell["mode"], cell["dropout"]) == panel
                and "seconds" in cell
            )
            if points:
                lengths, times = zip(*points)
                axis.loglog(lengths, times, "o-", base=2, label=name)
                axis.set_yscale("log", base=10)
        axis.set(title=f"{panel[0]}, dropout {panel[1]}", xlabel="tokens", ylabel="seconds")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    return True


class Verdicts:
    """Claims with what was measured; `failed` tells whether one did not hold."""

    def __init__(self) -> None:
        self.failed = False

    def at_least(self, claim: str, measured: float, limit: float) -> None:
        self._say(measured >= limit, f"{claim}: {measured:.2f}, at least {limit} is needed")

    def at_most(self, claim: str, measured: float, limit: float) -> None:
        self._say(measured <= limit, f"{claim}: {measured:.2f}, at most {limit} is allowed")

    def _say(self, holds: bool, text: str) -> None:
        self.failed |= not holds
        print(f"{'ok  ' if holds else 'FAIL'} {text}", flush=True)
