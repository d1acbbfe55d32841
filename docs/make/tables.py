"""Writes the tables of docs/benchmarks.md from the files in benchmarks/results.

    python docs/make/tables.py

A table stands between `<!-- table NAME -->` and `<!-- end -->`; a test compares what is committed
with what this writes. Times are in milliseconds unless a heading says otherwise.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
NAMES = {
    "adaptive_sparse": "this package",
    "longformer": "HF Longformer",
    "bigbird": "HF BigBird",
    "roberta-sdpa": "RoBERTa, SDPA",
    "modernbert-sdpa": "ModernBERT, SDPA",
    "adaptive_sparse-big_bird": "this package, BigBird's pattern",
    "adaptive_sparse-led-encoder": "this package, LED's encoder",
    "led-encoder": "HF LED's encoder",
    "cpp": "`cpp`",
    "blocked": "`blocked`",
    "sdpa": "torch's dense attention",
}


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def source(name: str, environment: dict[str, Any]) -> str:
    """Where a table comes from: file, device, versions and commit."""
    where = environment["device"].upper()
    if threads := environment.get("cpu_threads"):
        where += f", {threads} thread{'s' * (threads > 1)}"
    commit = f", commit {environment['commit']}" if "commit" in environment else ""
    return (
        f"[{name}](../benchmarks/results/{name}): {where}, torch {environment['torch']}, "
        f"Transformers {environment['transformers']}{commit}."
    )


def time_of(cell: dict[str, Any]) -> str:
    if "seconds" not in cell:
        return "-"
    memory = f" ({cell['memory'] / 2**20:,.0f})" if "memory" in cell else ""
    return f"{1000 * cell['seconds']:,.0f}{memory}"


def times(name: str, contestants: Sequence[str], lengths: Sequence[int]) -> str:
    """Contestants as columns, length, mode and dropout as rows."""
    result = read(name)
    cells = {
        (cell["name"], cell["length"], cell["mode"], cell["dropout"]): cell
        for cell in result["cells"]
    }
    rows = []
    for _, length, mode, dropout in dict.fromkeys(("", *key[1:]) for key in cells):
        if length not in lengths:
            continue
        words = f"{length:,} tokens, {mode}" + (f", dropout {dropout}" if dropout else "")
        found = [cells.get((one, length, mode, dropout), {}) for one in contestants]
        rows.append([words, *map(time_of, found)])
    head = ["", *(NAMES[one] for one in contestants)]
    return f"{markdown(head, rows)}\n\n{source(name, result['environment'])}"


def layer() -> str:
    names = ("adaptive_sparse", "longformer", "bigbird", "roberta-sdpa")
    return times("attention_speed.json", names, (512, 1024, 4096, 16384))


def operator() -> str:
    return times("attention_operator_cpu.json", ("cpp", "blocked", "sdpa"), (4096, 16384))


def small_encoder() -> str:
    names = ("adaptive_sparse", "longformer", "bigbird", "roberta-sdpa", "modernbert-sdpa")
    return times("model_throughput.json", names, (512, 4096, 16384))


def training_step() -> str:
    return times("model_training_step.json", ("adaptive_sparse", "longformer"), (4096,))


def families() -> str:
    pairs = (
        ("adaptive_sparse", "longformer"),
        ("adaptive_sparse-big_bird", "bigbird"),
        ("adaptive_sparse-led-encoder", "led-encoder"),
    )
    result = read("model_families.json")
    cells = {(cell["name"], cell["dropout"]): cell for cell in result["cells"]}
    rows = []
    for ours, theirs in pairs:
        for dropout in (0.0, 0.1):
            one, other = cells[ours, dropout], cells[theirs, dropout]
            rows.append(
                [
                    f"{NAMES[theirs]}, dropout {dropout:g}",
                    time_of(one),
                    time_of(other),
                    f"{other['seconds'] / one['seconds']:.1f}",
                    f"{one['memory'] / other['memory']:.0%}",
                ]
            )
    head = ("against", "this package", "the other", "times as fast", "of its memory")
    return f"{markdown(head, rows)}\n\n{source('model_families.json', result['environment'])}"


def quality_cells() -> list[dict]:
    lines = (RESULTS / "pattern_quality_full.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def candidates() -> str:
    """Accuracy on what is far in documents of 4,096 tokens, by task and number of candidates."""
    cells = [cell for cell in quality_cells() if cell["part"] == "candidates"]
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    rows = []
    for variant in dict.fromkeys(cell["variant"] for cell in cells):
        row = [variant]
        for task in tasks:
            found = [c for c in cells if (c["task"], c["variant"]) == (task, variant)]
            far = [cell["by_length"]["4096"]["far"] for cell in found]
            row.append(f"{statistics.mean(far):.2f} ({len(far)})" if far else "not run")
        rows.append(row)
    about = source("pattern_quality_full.jsonl", cells[0]["environment"])
    return f"{markdown(('candidates', *tasks), rows)}\n\n{about}"


def sizes() -> str:
    """What blocks of other sizes find at equal keys, and what the attention to them costs."""
    speed = read("block_sizes.json")
    length = max(cell["length"] for cell in speed["cells"])
    factors = {
        (cell["query_block"], cell["key_block"], cell["mode"]): cell["factor"]
        for cell in speed["cells"]
        if cell["length"] == length
    }
    cells = [cell for cell in quality_cells() if cell["part"] == "sizes"]
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    rows = []
    for variant in dict.fromkeys(cell["variant"] for cell in cells):
        found = [cell for cell in cells if cell["variant"] == variant]
        queries, keys = (int(number) for number in re.findall(r"\d+", variant))
        means = [
            statistics.mean(cell["finetuned"]["far"] for cell in found if cell["task"] == task)
            for task in tasks
        ]
        times = [factors[queries, keys, mode] for mode in ("forward", "forward+backward")]
        rows.append([variant, *(f"{mean:.3f}" for mean in means), *(f"{x:.2f}" for x in times)])
    head = ("blocks", *tasks, "time forward", "and backward")
    seeds = len({cell["seed"] for cell in cells})
    about = source("pattern_quality_full.jsonl", cells[0]["environment"])
    return (
        f"{markdown(head, rows)}\n\nMeans of {seeds} seeds; time at {length:,} tokens, that of "
        f"blocks of 64 x 64 is 1. {about} {source('block_sizes.json', speed['environment'])}"
    )


def quality() -> str:
    name = "pattern_quality_full.jsonl"
    rows = quality_cells()
    variants = {
        "full": "full attention",
        "oracle": "blocks by their exact share of full attention (`oracle`)",
        "adaptive": "**adaptive**",
        "adaptive, 100 keys": "adaptive, a quarter of BigBird's keys",
        "adaptive, sampled": "adaptive, blocks drawn in proportion to their mass",
        "random_selection": "blocks at random",
        "big_bird": "BigBird",
        "longformer": "Longformer, wider window",
        "linear": "linear attention",
        "lsh": "Reformer's buckets (`lsh`)",
    }
    table = []
    for variant, words in variants.items():
        cells, keys = [], set()
        for task in ("recall", "needles", "pairs", "bytes"):
            found = [
                row
                for row in rows
                if (row["part"], row["task"], row.get("variant")) == ("patterns", task, variant)
            ]
            if not found:
                cells.append("not run")
                continue
            keys.update(round(row["keys_per_query"]) for row in found if row.get("keys_per_query"))
            far = statistics.mean(row["finetuned"]["far"] for row in found)
            cells.append(f"{far:.2f}" + (f" ({len(found)})" if len(found) != 3 else ""))
        if set(cells) == {"not run"}:
            continue
        spread = (
            f"{min(keys):,}-{max(keys):,}" if len(keys) > 1 else "".join(f"{k:,}" for k in keys)
        )
        table.append([words, spread or "-", *cells])
    head = ("pattern", "keys per query", "recall", "needles", "pairs", "bytes")
    return f"{markdown(head, table)}\n\n{source(name, rows[0]['environment'])}"


def hyperpartisan() -> str:
    text = (RESULTS / "hyperpartisan.md").read_text(encoding="utf-8").strip()
    return f"{text}\n\n{source('hyperpartisan.json', read('hyperpartisan.json')['environment'])}"


def names() -> str:
    text = (RESULTS / "masked_names.md").read_text(encoding="utf-8").strip()
    lines = (RESULTS / "masked_names.jsonl").read_text(encoding="utf-8").splitlines()
    about = [json.loads(line)["environment"] for line in lines]
    commits = ", ".join(dict.fromkeys(one["commit"] for one in about))
    return f"{text}\n\n{source('masked_names.jsonl', {**about[0], 'commit': commits})}"


def fidelity() -> str:
    result = read("fidelity_4096.json")
    rows = []
    for name in dict.fromkeys(row["name"] for row in result["rows"]):
        found = {row["table"]: row for row in result["rows"] if row["name"] == name}
        errors = [f"{found[table]['error']:.3f}" for table in ("repeated", "averaged")]
        rows.append([name, f"{found['repeated']['keys_per_query']:,}", *errors])
    head = ("pattern", "keys per query", "error, positions repeated", "error, averaged")
    return f"{markdown(head, rows)}\n\n{source('fidelity_4096.json', result['environment'])}"


def recall() -> str:
    result = read("selection_recall.json")
    found: dict[tuple, list[float]] = {}
    for cell in result["cells"]:
        if cell["candidates"] < cell["length"]:
            name = (cell["keys"], cell["length"], cell["candidates"])
            found.setdefault(name, []).append(cell["recall"])
    most = sorted({name[2] for name in found})
    rows = []
    for keys, length in dict.fromkeys(name[:2] for name in found):
        cells = [found.get((keys, length, candidates)) for candidates in most]
        shares = ["all" if cell is None else f"{statistics.mean(cell):.2f}" for cell in cells]
        rows.append([keys, f"{length:,}", *shares])
    seeds = len(next(iter(found.values())))
    head = ("keys", "tokens", *(f"{candidates:,} candidates" for candidates in most))
    about = source("selection_recall.json", result["environment"])
    return f"{markdown(head, rows)}\n\nMeans of {seeds} seeds. {about}"


def embedding() -> str:
    name = "embedding_throughput.json"
    result = read(name)
    found = {
        (cell["name"], cell["length"]): cell["documents_per_second"] for cell in result["cells"]
    }
    columns = dict.fromkeys(one for one, _ in found)
    rows = [
        [f"{length:,} tokens", *(f"{found[one, length]:.2g}" for one in columns)]
        for length in dict.fromkeys(length for _, length in found)
    ]
    head = ["", *(NAMES.get(one, f"RoBERTa, {one}") for one in columns)]
    return f"{markdown(head, rows)}\n\n{source(name, result['environment'])}"


TABLES: dict[str, Callable[[], str]] = {
    one.__name__: one
    for one in (
        layer, operator, small_encoder, training_step, families, quality, candidates, sizes,
        hyperpartisan, names, fidelity, recall, embedding,
    )
}  # fmt: skip


def with_tables(page: str) -> str:
    """The text of the page with its tables as the results are now."""

    def replace(match: re.Match) -> str:
        return f"<!-- table {match[1]} -->\n\n{TABLES[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->.*?<!-- end -->", replace, page, flags=re.S)


def main() -> None:
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
