"""How many candidates does the selection need to find what a choice of all keys would?

    python benchmarks/selection_recall.py --preset quick
    python benchmarks/selection_recall.py --preset full      # to 131072 tokens

Keys are made up. "coherent" ones share topics with their neighbours at four scales, as those of a
text do; every query block looks for four far blocks (its targets), each with a few of its phrases
of four tokens. "adversarial" ones hide the targets: a block and its three siblings add up to
nothing, so that means of several blocks say nothing, and whole regions elsewhere look a little like
it. "needles" share nothing with their neighbours, and every phrase looks for a single key.

recall: share of the blocks that a choice among all keys finds. target: share of the targets in the
lists. missed mass: attention of the asking tokens, exact per token, outside window and list.
"""

import argparse
import math
import sys
import time
from dataclasses import asdict
from typing import NamedTuple

import torch
from side_by_side.measure import environment
from side_by_side.report import write_json
from side_by_side.results import add_results_arguments, results_folder

from adaptive_longformer.patterns import SlidingWindow
from adaptive_longformer.selection.exact import ALL_PER_CANDIDATE
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.selection.select_blocks import SelectedBlocks, select_blocks

BLOCK, HEADS, HEAD_DIM = 16, 2, 64
SCALES = (64, 256, 1024, 4096)
WINDOW = SlidingWindow(256)
DEFAULT = SelectionOptions()
EVERYTHING = 2**30
CANDIDATES = (1024, 2048, 4096, 8192)
PRESETS = {
    "quick": {"lengths": [4096, 16384], "seeds": 1},
    "full": {"lengths": [4096, 16384, 32768, 65536, 131072], "seeds": 3},
}
SAMPLED_BLOCKS = 16
TARGETS, PHRASE = 4, 4


class Document(NamedTuple):
    """Queries and keys [1, heads, length, head_dim], the targets of every query block [heads,
    blocks, TARGETS], and which tokens ask for one of them [heads, length].
    """

    query: torch.Tensor
    key: torch.Tensor
    wanted: torch.Tensor
    asks: torch.Tensor


def coherent(length: int, generator: torch.Generator) -> Document:
    topic = torch.zeros(HEADS, length, HEAD_DIM)
    for scale in SCALES:
        drawn = torch.randn(HEADS, -(-length // scale), HEAD_DIM, generator=generator) * 0.5
        topic += drawn.repeat_interleave(scale, dim=1)[:, :length]
    return _document(topic, generator)


def adversarial(length: int, generator: torch.Generator) -> Document:
    num_blocks = length // BLOCK
    own = torch.randn(HEADS, num_blocks // 4, 4, HEAD_DIM, generator=generator)
    own = (own - own.mean(dim=2, keepdim=True)).flatten(1, 2)
    region = torch.randn(HEADS, num_blocks // 16, HEAD_DIM, generator=generator) * 0.7
    topic = own + region.repeat_interleave(16, dim=1)
    return _document(topic.repeat_interleave(BLOCK, dim=1), generator, aims=own)


def _document(
    topic: torch.Tensor,
    generator: torch.Generator,
    aims: torch.Tensor | None = None,
    is_single: bool = False,
) -> Document:
    """Half of the phrases of a block ask for its targets, or for the first key of each, the others
    for nothing.
    """
    length = topic.shape[1]
    num_blocks, phrases = length // BLOCK, length // PHRASE
    noise = 1.0 if is_single else 0.5
    key = topic + noise * torch.randn(HEADS, length, HEAD_DIM, generator=generator)
    if is_single:
        aims = key[:, ::BLOCK]
    reach = WINDOW.left // BLOCK + 2
    offset = torch.randint(
        reach, num_blocks - reach, (HEADS, num_blocks, TARGETS), generator=generator
    )
    wanted = (torch.arange(num_blocks)[:, None] + offset) % num_blocks
    aims = topic.unflatten(1, (-1, BLOCK))[:, :, 0] if aims is None else aims
    aims = aims / aims.norm(dim=-1, keepdim=True) * 10.0
    choice = torch.randint(TARGETS, (HEADS, phrases), generator=generator)
    of_phrase = wanted.repeat_interleave(BLOCK // PHRASE, dim=1)  # [heads, phrases, TARGETS]
    target = of_phrase.gather(2, choice[..., None]).expand(-1, -1, HEAD_DIM)
    asks = torch.rand(HEADS, phrases, generator=generator) < 0.5
    aim = aims.gather(1, target) * asks[..., None]
    query = torch.randn(HEADS, length, HEAD_DIM, generator=generator)
    query += aim.repeat_interleave(PHRASE, dim=1)
    return Document(query[None], key[None], wanted, asks.repeat_interleave(PHRASE, dim=1))


def needles(length: int, generator: torch.Generator) -> Document:
    return _document(torch.zeros(HEADS, length, HEAD_DIM), generator, is_single=True)


KEYS = {"coherent": coherent, "adversarial": adversarial, "needles": needles}


def recall(found: SelectedBlocks, exact: SelectedBlocks) -> float:
    """Share of the blocks of one choice that are in another."""
    in_found = torch.arange(found.key_blocks.shape[-1]) < found.counts[..., None]
    in_exact = torch.arange(exact.key_blocks.shape[-1]) < exact.counts[..., None]
    same = exact.key_blocks[..., None] == found.key_blocks[..., None, :].where(
        in_found[..., None, :], -1
    )
    return float((same.any(dim=-1) & in_exact).sum() / in_exact.sum())


def found_targets(found: SelectedBlocks, wanted: torch.Tensor) -> float:
    used = torch.arange(found.key_blocks.shape[-1]) < found.counts[..., None]
    lists = found.key_blocks.where(used, -1)[0]  # [heads, blocks, num_blocks]
    return float((wanted[..., None] == lists[:, :, None]).any(dim=-1).float().mean())


def missed_mass(document: Document, found: SelectedBlocks) -> float:
    """Mean attention outside window and list, exact, of the asking tokens of sampled blocks."""
    length = document.key.shape[2]
    rows = torch.linspace(0, length // BLOCK - 1, SAMPLED_BLOCKS).long().tolist()
    position, missed = torch.arange(length), []
    for row in rows:
        for head in range(HEADS):
            tokens = torch.arange(row * BLOCK, (row + 1) * BLOCK)
            tokens = tokens[document.asks[head, tokens]]
            scores = document.query[0, head, tokens] @ document.key[0, head].T / HEAD_DIM**0.5
            of_block = torch.zeros(length // BLOCK, dtype=torch.bool)
            of_block[found.key_blocks[0, head, row, : found.counts[0, head, row]].long()] = True
            is_read = (position - tokens[:, None]).abs() <= WINDOW.left
            is_read |= of_block.repeat_interleave(BLOCK)
            missed.append((scores.softmax(dim=-1) * ~is_read).sum(dim=-1))
    return float(torch.cat(missed).mean())


def met(candidates: int, length: int) -> int:
    """The keys that are candidates."""
    return length if length <= ALL_PER_CANDIDATE * candidates else candidates


def measure(kind: str, length: int, seed: int) -> list[dict]:
    """The choice among all keys, and among fewer, on one draw of queries and keys."""
    document = KEYS[kind](length, torch.Generator().manual_seed(seed))
    cells, exact = [], None
    for candidates in (EVERYTHING, *(count for count in CANDIDATES if met(count, length) < length)):
        options = SelectionOptions(num_candidates=candidates)
        begin = time.process_time()
        choice = select_blocks(document.query, document.key, WINDOW, options)
        used = time.process_time() - begin
        exact = exact or choice
        cells.append(
            {
                "keys": kind,
                "length": length,
                "seed": seed,
                "candidates": met(candidates, length),
                "recall": recall(choice, exact),
                "target": found_targets(choice, document.wanted),
                "missed_mass": missed_mass(document, choice),
                "seconds": used,
            }
        )
    return cells


def table(cells: list[dict]) -> str:
    """Means over the seeds."""
    lines = [
        f"{'keys':<12}{'tokens':>8}{'candidates':>12}{'recall':>8}{'target':>8}{'missed':>8}"
        f"{'seconds':>9}"
    ]
    groups: dict[tuple, list[dict]] = {}
    for cell in cells:
        groups.setdefault((cell["keys"], cell["length"], cell["candidates"]), []).append(cell)
    for (kind, length, candidates), group in sorted(groups.items()):
        mean = {
            name: sum(cell[name] for cell in group) / len(group)
            for name in ("recall", "target", "missed_mass", "seconds")
        }
        lines.append(
            f"{kind:<12}{length:>8}{candidates:>12}{mean['recall']:>8.3f}{mean['target']:>8.3f}"
            f"{mean['missed_mass']:>8.3f}{mean['seconds']:>9.2f}"
        )
    return "\n".join(lines)


def growth(cells: list[dict]) -> list[dict]:
    """Exponents of the processor time between the longest and 16384 tokens."""
    results = []
    for candidates in (DEFAULT.num_candidates, EVERYTHING):
        points = [
            cell
            for cell in cells
            if cell["length"] >= 16384 and cell["candidates"] == met(candidates, cell["length"])
        ]
        low, high = (pick((cell["length"] for cell in points), default=0) for pick in (min, max))
        if low == high:
            continue
        sums = [sum(c["seconds"] for c in points if c["length"] == n) for n in (low, high)]
        exponent = math.log(sums[1] / sums[0]) / math.log(high / low)
        name = "all" if candidates == EVERYTHING else candidates
        results.append({"candidates": name, "from": low, "to": high, "exponent": exponent})
    return results


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="quick")
    parser.add_argument("--lengths", type=int, nargs="+", help=f"multiples of {64 * BLOCK}")
    parser.add_argument("--seeds", type=int)
    add_results_arguments(parser)
    parser.add_argument(
        "--check", action="store_true", help="fail if recall on coherent keys is < 0.95"
    )
    args = parser.parse_args()
    args.lengths = args.lengths or PRESETS[args.preset]["lengths"]
    args.seeds = args.seeds or PRESETS[args.preset]["seeds"]
    if any(length < 2048 or length % (64 * BLOCK) for length in args.lengths):
        parser.error(f"--lengths is {args.lengths}, multiples of {64 * BLOCK} from 2048 are needed")
    return args


def main() -> int:
    args = parse_arguments()
    folder = None if args.check else results_folder(args)
    cells = []
    for kind in KEYS:
        for length in args.lengths:
            for seed in range(args.seeds):
                cells += measure(kind, length, seed)
                print(f"{kind}, {length} tokens, seed {seed}", file=sys.stderr)
    print(table(cells))
    exponents = growth(cells)
    for line in exponents:
        print(
            f"{line['candidates']} candidates: from {line['from']} to {line['to']} tokens the time "
            f"grows as n^{line['exponent']:.2f}"
        )
    if folder is not None:
        about = environment(torch.device("cpu"))
        settings = {"heads": HEADS, "head_dim": HEAD_DIM, "window": 2 * WINDOW.left}
        settings |= asdict(DEFAULT)
        write_json(
            folder / "selection_recall.json",
            environment=about, settings=settings, cells=cells, growth=exponents,
        )  # fmt: skip
    usual = [c for c in cells if c["candidates"] == met(DEFAULT.num_candidates, c["length"])]
    worst = min(cell["recall"] for cell in usual if cell["keys"] == "coherent")
    print(f"lowest recall of {DEFAULT.num_candidates} candidates on coherent keys: {worst:.3f}")
    return int(args.check and worst < 0.95)


if __name__ == "__main__":
    sys.exit(main())
