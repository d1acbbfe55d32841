"""Draws the pictures of the documentation as SVG, the charts from benchmarks/results.

    python docs/make/pictures.py

A test compares the committed files with what this writes.
"""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "pictures"

INK, SOFT, PAPER = "#22313f", "#e3e7ea", "#ffffff"
WINDOW, GLOBAL, CHOSEN, OTHER = "#4c78a8", "#f2b134", "#d1495b", "#9aa5ae"


class Drawing:
    """Shapes on white paper; sizes in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" font-family="sans-serif">',
            f"<title>{title}</title>",
            f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        ]

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        stroke: str = "none",
        corner: int = 0,
    ) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{corner}" '
            f'fill="{fill}" stroke="{stroke}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: int = 13,
        anchor: str = "start",
        bold: bool = False,
        fill: str = INK,
    ) -> None:
        weight = ' font-weight="bold"' if bold else ""
        words = words.replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"{weight} '
            f'fill="{fill}">{words}</text>'
        )

    def line(
        self,
        x1: float,
        y1: float,
        x2: float,
        y2: float,
        stroke: str = INK,
        width: float = 1.5,
        arrow: bool = False,
    ) -> None:
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{stroke}" '
            f'stroke-width="{width:g}"/>'
        )
        if arrow:
            along = (x2 > x1) - (x2 < x1), (y2 > y1) - (y2 < y1)
            across = along[1], along[0]
            tips = [
                (x2 - 7 * along[0] + side * 4 * across[0], y2 - 7 * along[1] + side * 4 * across[1])
                for side in (1, -1)
            ]
            points = " ".join(f"{x:g},{y:g}" for x, y in [(x2, y2), *tips])
            self.parts.append(f'<polygon points="{points}" fill="{stroke}"/>')

    def legend(self, x: float, y: float, entries: Iterable[tuple[str, str]]) -> None:
        for color, words in entries:
            self.box(x, y - 11, 13, 13, color)
            self.text(x + 19, y, words)
            x += 36 + 7.2 * len(words)

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


def who_reads_whom() -> str:
    """Three squares of blocks: sliding window, BigBird, and a choice."""
    n, cell = 24, 9
    chosen = {
        row: {(row * 7 + 5) % n, (row // 4 * 9 + 3) % n, (row // 3 * 5 + 14) % n}
        for row in range(n)
    }
    drawn = {row: {(row * 11 + 7) % n, (row * 5 + 16) % n} for row in range(n)}

    def longformer(row: int, column: int) -> str:
        if row == 0 or column == 0:
            return GLOBAL
        return WINDOW if abs(row - column) <= 2 else SOFT

    def big_bird(row: int, column: int) -> str:
        if row in (0, n - 1) or column in (0, n - 1):
            return GLOBAL
        if abs(row - column) <= 1:
            return WINDOW
        return OTHER if column in drawn[row] else SOFT

    def adaptive(row: int, column: int) -> str:
        color = longformer(row, column)
        return CHOSEN if color == SOFT and column in chosen[row] else color

    drawing = Drawing(780, 318, "Who reads whom: Longformer, BigBird, adaptive")
    for number, (name, color_of) in enumerate(
        (("Longformer", longformer), ("BigBird", big_bird), ("adaptive", adaptive))
    ):
        left, top = 40 + 250 * number, 46
        drawing.text(left + n * cell / 2, 30, name, 15, "middle", bold=True)
        for row in range(n):
            for column in range(n):
                drawing.box(
                    left + column * cell,
                    top + row * cell,
                    cell - 1,
                    cell - 1,
                    color_of(row, column),
                )
    drawing.text(24, 46 + n * cell / 2, "↓", 16, "middle")
    words = "Rows: blocks of queries, from the start of the document. Columns: the keys they read."
    drawing.text(40, 280, words, 12)
    drawing.legend(
        40,
        304,
        (
            (WINDOW, "window"),
            (GLOBAL, "global"),
            (OTHER, "drawn at random"),
            (CHOSEN, "chosen"),
            (SOFT, "not read"),
        ),
    )
    return drawing.svg()


def one_block_reads() -> str:
    """A document as a row of blocks, and what one of them reads."""
    n, cell, left, top, asks = 32, 22, 38, 78, 21
    drawing = Drawing(780, 190, "What one block of a document reads")
    chosen = (4, 5, 12, 28)
    for block in range(n):
        color = SOFT
        if abs(block - asks) <= 2:
            color = WINDOW
        elif block in chosen:
            color = CHOSEN
        drawing.box(left + block * cell, top, cell - 2, 34, color)
    drawing.box(left, top, 5, 34, GLOBAL)
    drawing.box(left + asks * cell - 1, top - 1, cell, 36, "none", INK)
    middle = left + asks * cell + cell / 2 - 1
    drawing.text(middle, 20, "these 16 queries", 13, "middle", bold=True)
    drawing.line(middle, 28, middle, top - 4, arrow=True)
    for block in chosen:
        x = left + block * cell + cell / 2 - 1
        drawing.line(x, 52, x, top - 3, CHOSEN, arrow=True)
    drawing.line(left + 4 * cell + cell / 2, 52, left + 28 * cell + cell / 2, 52, CHOSEN)
    drawing.text(left + 4 * cell + 10, 44, "read these blocks because the keys there fit them", 12)
    drawing.text(left, top + 54, "start of the document", 12)
    drawing.text(left + n * cell - 2, top + 54, "end", 12, "end")
    drawing.legend(
        left,
        170,
        (
            (WINDOW, "window: the neighbours"),
            (GLOBAL, "a global token"),
            (CHOSEN, "chosen blocks"),
            (SOFT, "not read"),
        ),
    )
    return drawing.svg()


def two_stages() -> str:
    """Candidates by means of keys, then the choice among their keys."""
    drawing = Drawing(780, 292, "How blocks are found")
    left, size = 190, 560 / 64
    candidates = {4, 9, 10, 11, 21, 22, 23, 29, 30, 37, 38, 47, 52, 53}
    rows = [
        ("means of 16 keys", candidates, "#edb9c0"),
        ("keys of candidates", candidates, "#edb9c0"),
        ("blocks that are read", {10, 22, 29, 38}, CHOSEN),
    ]
    lines = (
        "Longer documents only: every query meets the means, and keeps the blocks that weigh most.",
        "Every query meets every key there. A block's mass: the share of their attention it gets.",
        "The blocks with the largest mass are read exactly, with window and global tokens.",
    )
    for number, ((name, found, color), line) in enumerate(zip(rows, lines, strict=True)):
        y = 40 + 86 * number
        drawing.text(left, y - 10, line, 12)
        drawing.text(left - 14, y + 22, name, 12, "end")
        for node in range(64):
            drawing.box(left + node * size, y, size - 2, 34, color if node in found else SOFT)
        if number < 2:
            drawing.line(left + 275, y + 38, left + 275, y + 58, OTHER, arrow=True)
    return drawing.svg()


def rooms() -> str:
    """The rooms of the package; imports go down."""
    drawing = Drawing(780, 414, "The rooms of the package")
    floors = [
        [("command line", "__main__, doctor, export, quickstart, build_kernels")],
        [
            ("conversion", "from and to other families"),
            ("training", "collator, ramp, calibrate"),
            ("inference", "answer, summarize"),
            ("analysis", "report"),
        ],
        [("modeling", "encoder, causal model, encoder-decoder; integration with Transformers")],
        [("configuration", "all fields, all checks")],
        [("baselines", "what it is compared with: linear, lsh, random and exact selection")],
        [("selection", "which blocks are read")],
        [
            ("attention", "what is computed: operator, reference, dropout, padding"),
            ("backends, kernels", "how: sdpa, cuda, cpp, blocked"),
        ],
        [("patterns", "which keys a query may read, lists of blocks")],
    ]
    for number, floor in enumerate(floors):
        y, gap = 14 + 50 * number, 10
        width = (740 - gap * (len(floor) - 1)) / len(floor)
        for place, (name, content) in enumerate(floor):
            x = 20 + place * (width + gap)
            drawing.box(x, y, width, 40, "#eef3f7", WINDOW, 5)
            drawing.text(x + width / 2, y + 17, name, 13, "middle", bold=True)
            drawing.text(x + width / 2, y + 33, content, 11, "middle")
    return drawing.svg()


def speed() -> str:
    """Milliseconds of one layer, forward and backward."""
    cells = json.loads((RESULTS / "attention_speed.json").read_text())["cells"]
    names = {
        "adaptive_sparse": "this package",
        "longformer": "HF Longformer",
        "bigbird": "HF BigBird",
        "roberta-sdpa": "RoBERTa, SDPA",
    }
    lengths = (1024, 4096, 16384)
    drawing = Drawing(780, 330, "One attention layer, forward and backward")
    drawing.text(
        20,
        26,
        "One attention layer, forward + backward, seconds on two CPU cores (shorter is better)",
        14,
        bold=True,
    )
    y = 50
    for length in lengths:
        drawing.text(20, y + 12, f"{length:,} tokens", 13, bold=True)
        found = {
            cell["name"]: cell["seconds"]
            for cell in cells
            if cell["length"] == length
            and cell["mode"] == "forward+backward"
            and cell["dropout"] == 0
            and "seconds" in cell
        }
        for name, words in names.items():
            seconds = found[name]
            width = 440 * seconds / max(found.values())
            color = CHOSEN if name == "adaptive_sparse" else OTHER
            drawing.text(262, y + 12, words, 12, "end")
            drawing.box(270, y, width, 15, color)
            drawing.text(276 + width, y + 12, f"{seconds:.2f}", 12)
            y += 20
        y += 14
    return drawing.svg()


def far_accuracy(task: str, variant: str) -> tuple[float, float]:
    """Mean accuracy on what is far after fine-tuning, and keys per query."""
    rows = [json.loads(line) for line in (RESULTS / "pattern_quality_full.jsonl").open()]
    rows = [
        row
        for row in rows
        if (row["part"], row["task"], row.get("variant")) == ("patterns", task, variant)
    ]
    return (
        statistics.mean(row["finetuned"]["far"] for row in rows),
        statistics.mean(row["keys_per_query"] for row in rows),
    )


def quality() -> str:
    """Accuracy on what is far, for two tasks."""
    variants = (
        ("full", "full attention", OTHER),
        ("adaptive", "adaptive", CHOSEN),
        ("big_bird", "BigBird", OTHER),
        ("random_selection", "blocks at random", OTHER),
        ("longformer", "Longformer, wider window", OTHER),
    )
    drawing = Drawing(780, 290, "What is found far away")
    drawing.text(
        20,
        26,
        "Words found more than 256 tokens away in 1,024 tokens (longer is better; chance 0.06)",
        14,
        bold=True,
    )
    y = 50
    for task, words in (("recall", "runs of 16 words"), ("needles", "single words")):
        drawing.text(20, y + 12, words, 13, bold=True)
        for variant, name, color in variants:
            accuracy, keys = far_accuracy(task, variant)
            width = 330 * accuracy
            drawing.text(352, y + 12, f"{name}, {keys:,.0f} keys", 12, "end")
            drawing.box(360, y, width, 15, color)
            drawing.text(366 + width, y + 12, f"{accuracy:.2f}", 12)
            y += 20
        y += 14
    return drawing.svg()


ALL = {
    "who-reads-whom": who_reads_whom,
    "one-block-reads": one_block_reads,
    "two-stages": two_stages,
    "rooms": rooms,
    "speed": speed,
    "quality": quality,
}


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    for name, draw in ALL.items():
        (PICTURES / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
