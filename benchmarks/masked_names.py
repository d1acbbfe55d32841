"""Does reading chosen blocks help a language model with real weights on real documents?

    python benchmarks/masked_names.py --model BERT_FOLDER --seeds 0 1
    python benchmarks/masked_names.py --model BERT_FOLDER \
        --train-file train.jsonl --eval-file validation.jsonl

The documents are the source files of Python's standard library, an eighth of them unseen, or those
of two files. A pretrained BERT first learns to predict masked words again, in pieces of its own
length, as published encoders come without that head: ordinary words, and names that stand again
more than 32 tokens away. Then it is converted to read long documents and goes on,
the same steps on the same pieces for every pattern at about 256 keys per query, and for full
attention.
Its position table is repeated as in any conversion, or with --positions made longer in another way.
Beside ordinary masking some words are masked that also stand more than 256 tokens away: everywhere
within 256 tokens, so that no window shows them. What counts is how well these words of unseen
documents are found: bits of surprise and accuracy, with the standard error over documents.

A run stores its state every 50 steps and goes on from there; finished ones are lines of
masked_names.jsonl. Every run is a process of its own, whose peak memory is its pattern's.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from quality.source_code import files_of_the_library
from side_by_side.measure import default_dtype, environment
from side_by_side.results import add_results_arguments, results_folder
from torch.nn.functional import cross_entropy, interpolate
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, set_seed

from adaptive_longformer import convert_checkpoint
from adaptive_longformer.analysis.watching import watch
from adaptive_longformer.modeling.adaptive_selection import selections, set_selection_strength
from adaptive_longformer.patterns.block_layout import EntryFlag
from adaptive_longformer.training import adaptive_parameter_groups

FAR, SOURCE_FAR = 256, 32
# Words, by letters and by how often they stand in a piece, that are names rather than grammar.
LETTERS, MOST_PLACES = 4, 12
FAR_SHARE, ORDINARY_SHARE = 0.10, 0.05
SOURCE_BATCH, SOURCE_LEARNING_RATE = 4, 3e-4
UNPLACED_PIECES = 32
STORED_EVERY, RAMP_RATIO, WARM_UP = 50, 0.25, 0.05
CHOOSING = {"attention_window": 128, "num_selected_blocks": 8}
ARMS = {
    "adaptive": {"attention_pattern": "adaptive", **CHOOSING},
    "sampled": {"attention_pattern": "adaptive", "selection_sampling": True, **CHOOSING},
    "longformer": {"attention_pattern": "longformer", "attention_window": 256},
    "random_selection": {"attention_pattern": "random_selection", **CHOOSING},
    "big_bird": {"attention_pattern": "big_bird", "block_size": 32, "num_random_blocks": 3},
    "full": {"attention_pattern": "full"},
}
# How the position table is made longer, and what the choice sees of it.
POSITIONS = {
    "repeated": "the source's rows again and again, which the choice does not see",
    "seen": "the same, and it does",
    "unplaced": "the same, and blocks chosen by keys less the mean of those with the same row",
    "averaged": "after the source's rows the mean of its rows everywhere",
    "interpolated": "the source's rows stretched over the longer table",
}
# Of these, those that only what chooses can tell from the first.
OF_THE_CHOICE = ("seen", "unplaced")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="BERT: folder or hub id")
    parser.add_argument(
        "--train-file", help="jsonl with a column of texts; default: Python's standard library"
    )
    parser.add_argument("--eval-file", help="the same, of other documents")
    parser.add_argument("--column", default="document")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--positions", nargs="+", choices=POSITIONS, default=["repeated"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--length", type=int, default=2048, help="tokens of a piece")
    parser.add_argument("--source-steps", type=int, default=2400, help="before the conversion")
    parser.add_argument("--steps", type=int, default=300, help="of one piece each")
    parser.add_argument("--eval-pieces", type=int, default=2, help="of every unseen document")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"),
        help="autocast's type; default: float32 on a CPU, bfloat16 on a GPU",
    )  # fmt: skip
    add_results_arguments(parser)
    args = parser.parse_args()
    args.dtype = args.dtype or default_dtype(args.device)
    if (args.train_file is None) != (args.eval_file is None):
        parser.error("--train-file and --eval-file belong together")
    if args.length < 4 * FAR:
        parser.error(f"--length is {args.length}, at least {4 * FAR} is needed")
    return args


def read_pieces(args, length: int, tokenizer, *, unseen: bool = False) -> list[list[dict]]:
    """Of every document its whole pieces: token ids [length] and the words, (first token, one more
    than the last, text).
    """
    if args.train_file is None:
        texts = [text.decode(errors="replace") for text in files_of_the_library(unseen)]
    else:
        file = Path(args.eval_file if unseen else args.train_file)
        lines = file.read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)[args.column] for line in lines]
    documents = []
    for text in texts:
        room = length - 2
        encoding = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        text = text.lower()
        pieces = []
        for start in range(0, len(encoding.input_ids) - room + 1, room):
            ids = encoding.input_ids[start : start + room]
            ids = [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]
            words: list[list] = []
            numbers = encoding.word_ids()[start : start + room]
            for token, number in enumerate(numbers, start=1):
                begin, end = encoding.offset_mapping[start + token - 1]
                if token > 1 and number == numbers[token - 2]:
                    words[-1][1], words[-1][2] = token + 1, words[-1][2] + text[begin:end]
                else:
                    words.append([token, token + 1, text[begin:end]])
            pieces.append({"ids": torch.tensor(ids), "words": words})
        if pieces:
            documents.append(pieces)
    return documents


def mask_piece(
    piece: dict, mask_token: int, generator: torch.Generator, *, far: int = FAR
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A piece with masked tokens, their labels (-100 elsewhere), and which of these stand, as
    words, only far away: each [length].
    """
    ids, words = piece["ids"], piece["words"]
    length = len(ids)
    places: dict[str, list[int]] = {}
    for index, (_, _, text) in enumerate(words):
        if len(text) >= LETTERS and text.isalpha():
            places.setdefault(text, []).append(index)
    is_masked, is_far = torch.zeros(2, length, dtype=torch.bool)
    is_masked[1:-1] = torch.rand(length - 2, generator=generator) < ORDINARY_SHARE
    for index in torch.randperm(len(words), generator=generator).tolist():
        if is_far.sum() >= FAR_SHARE * length:
            break
        first, last, text = words[index]
        others = [words[other] for other in places.get(text, ()) if other != index]
        is_shown = _is_shown_far_away(first, others, is_masked, far)
        if not is_shown or len(others) >= MOST_PLACES or is_far[first:last].any():
            continue
        is_masked[first:last] = is_far[first:last] = True
        for begin, end, _ in others:
            is_masked[begin:end] |= not _is_far_away(first, begin, end, far)
    # A word that was shown then may be masked since.
    for first, last, text in words:
        if is_far[first:last].any():
            every = [words[index] for index in places[text]]
            is_far[first:last] = _is_shown_far_away(first, every, is_masked, far)
    labels = ids.masked_fill(~is_masked, -100)
    return ids.masked_fill(is_masked, mask_token), labels, is_far


def _is_far_away(first: int, begin: int, end: int, far: int) -> bool:
    return abs(begin - first) > far + end - begin


def _is_shown_far_away(first: int, words: list[list], is_masked: torch.Tensor, far: int) -> bool:
    """Whether one of the words stands far from a place; what is masked itself answers nothing."""
    return any(
        _is_far_away(first, begin, end, far) and not is_masked[begin:end].any()
        for begin, end, _ in words
    )


def batches(
    documents: list[list[dict]], mask_token: int, steps: range, seed: int, *, size: int, far: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and labels of steps, [size, length]; a step's do not depend on where one begins."""
    pieces = [piece for document in documents for piece in document]
    for step in steps:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        chosen = torch.randint(len(pieces), (size,), generator=generator).tolist()
        masked = [mask_piece(pieces[index], mask_token, generator, far=far)[:2] for index in chosen]
        ids, labels = (torch.stack(tensors) for tensors in zip(*masked, strict=True))
        yield ids, labels


def logits_of_masked(model, ids: torch.Tensor, labels: torch.Tensor, args) -> torch.Tensor:
    """The head's logits where something is masked: [masked, vocabulary], float32."""
    is_low = args.dtype != "float32"
    head = model.cls if hasattr(model, "cls") else model.lm_head  # BERT's is called cls
    with torch.autocast(torch.device(args.device).type, getattr(torch, args.dtype), enabled=is_low):
        states = model.base_model(ids.to(args.device)).last_hidden_state
        return head(states[labels.to(args.device) >= 0]).float()


@torch.no_grad()
def set_positions(model, way: str, source_rows: int) -> None:
    """Makes the repeated position table longer in another of the `POSITIONS`."""
    table = model.model.embeddings.position_embeddings.weight[model.config.position_offset :]
    source = table[:source_rows].clone()
    if way == "averaged":
        table[source_rows:] = source.mean(dim=0)
    else:
        stretched = interpolate(source.T[None], len(table), mode="linear", align_corners=True)
        table.copy_(stretched[0].T)


def choose_without_positions(model, pieces: list[dict], source_rows: int, device: str) -> None:
    """Lets layers choose by keys without what keys with the same row of positions share."""
    parts = selections(model)
    sums = [0.0] * len(parts)

    def see(number, part, args, reads) -> None:
        key = args[1].float()
        rows = torch.arange(key.shape[2], device=key.device) % source_rows
        means = key.new_zeros(*key.shape[:2], source_rows, key.shape[3])
        means.index_add_(2, rows, key)
        sums[number] = sums[number] + means / rows.bincount()[:, None] / len(pieces)

    for piece in pieces:
        watch(model, {"input_ids": piece["ids"][None].to(device)}, see)

    def without(means):
        def hook(part, args):
            rows = torch.arange(args[1].shape[2], device=args[1].device) % source_rows
            return args[0], args[1] - means[:, :, rows].to(args[1].dtype), *args[2:]

        return hook

    for part, means in zip(parts, sums, strict=True):
        part.register_forward_pre_hook(without(means))


@torch.no_grad()
def share_of_repeated_offsets(model, pieces: list[dict], source_rows: int, device: str) -> float:
    """The share of the chosen blocks whose distance is a whole number of the source's lengths."""
    hits = total = 0

    def see(number, part, args, reads) -> None:
        nonlocal hits, total
        layout = reads.pattern_or_layout
        is_selected = (layout.flags & EntryFlag.SELECTED) != 0
        row = torch.arange(layout.key_blocks.shape[2], device=layout.key_blocks.device)
        query_start = row[:, None] * part.options.query_block_size
        distance = layout.key_blocks * part.options.block_size - query_start
        hits += int((is_selected & (distance % source_rows == 0)).sum())
        total += int(is_selected.sum())

    for piece in pieces:
        watch(model, {"input_ids": piece["ids"][None].to(device)}, see)
    return hits / max(total, 1)


@torch.no_grad()
def evaluate(model, documents: list[list[dict]], mask_token: int, args) -> dict:
    """Bits and accuracy on far words, document by document, and their means."""
    model.eval()
    generator = torch.Generator().manual_seed(10**6)
    bits, right, every = [], [], []
    for pieces in documents:
        of_document: list[torch.Tensor] = []
        for piece in pieces[: args.eval_pieces]:
            ids, labels, is_far = mask_piece(piece, mask_token, generator)
            log_odds = logits_of_masked(model, ids[None], labels[None], args).cpu()
            log_odds = log_odds.log_softmax(dim=-1)
            is_asked = labels >= 0
            found = -log_odds.gather(-1, labels[is_asked][:, None])[:, 0] / math.log(2)
            is_right = log_odds.argmax(dim=-1) == labels[is_asked]
            every.append(found.mean().item())
            far = is_far[is_asked]
            of_document.append(torch.stack([found[far], is_right[far].float()]))
        means = torch.cat(of_document, dim=1).mean(dim=1).tolist()
        bits.append(means[0])
        right.append(means[1])
    return {
        "far_bits": statistics.mean(bits),
        "far_accuracy": statistics.mean(right),
        "bits": statistics.mean(every),
        "far_bits_by_document": bits,
        "far_accuracy_by_document": right,
    }


def train(
    model,
    file: Path,
    documents: list,
    args,
    *,
    steps: int,
    seed: int,
    size: int,
    far: int,
    rate: float,
) -> float:
    """Trains a masked language model, or goes on with it from what stands in a file.

    Returns:
        Seconds of the processor per step.
    """
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # The vocabulary is half of a small model and half of the time of a step.
    model.get_input_embeddings().requires_grad_(False)
    groups = adaptive_parameter_groups(model, rate) if selections(model) else model.parameters()
    optimizer = torch.optim.AdamW(groups, lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (WARM_UP * steps), 1 - step / steps)
    )
    first, used, parts = 0, 0.0, (model, optimizer, schedule)
    if file.exists():
        state = torch.load(file, weights_only=True)
        first, used = state["step"], state["seconds"]
        for part, values in zip(parts, state["parts"], strict=True):
            part.load_state_dict(values)
    model.train()
    todo, losses = range(first, steps), []
    pieces = batches(documents, tokenizer.mask_token_id, todo, seed, size=size, far=far)
    for step, (ids, labels) in zip(todo, pieces, strict=True):
        begin = time.process_time()
        set_seed(1_000_003 * seed + step)  # of what is chosen at random
        if selections(model):
            set_selection_strength(model, min(1.0, (step + 1) / (RAMP_RATIO * steps)))
        logits = logits_of_masked(model, ids, labels, args)
        loss = cross_entropy(logits, labels[labels >= 0].to(args.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        used += time.process_time() - begin
        losses.append(loss.item())
        if (step + 1) % STORED_EVERY == 0:
            mean = statistics.mean(losses[-STORED_EVERY:])
            print(f"{file.stem}, step {step + 1}: loss {mean:.3f}", file=sys.stderr, flush=True)
            values = [part.state_dict() for part in parts]
            torch.save({"step": step + 1, "seconds": used, "parts": values}, f"{file}.new")
            os.replace(f"{file}.new", file)
    return used / steps


def make_source(args: argparse.Namespace, folder: Path) -> None:
    """The masked language model that every arm starts from, converted to the length of pieces."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    set_seed(0)  # the head is new
    # About one pass over the documents: nothing is learned by heart that dropout would prevent.
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = AutoModelForMaskedLM.from_pretrained(args.model, **off).to(args.device)
    length = model.config.max_position_embeddings
    documents = read_pieces(args, length, tokenizer)
    train(
        model, folder / "source.pt", documents, args, steps=args.source_steps, seed=0,
        size=SOURCE_BATCH, far=SOURCE_FAR, rate=SOURCE_LEARNING_RATE,
    )  # fmt: skip
    model.save_pretrained(folder / "source")
    tokenizer.save_pretrained(folder / "source")
    convert_checkpoint(folder / "source", folder / "converted", max_positions=args.length)


def run_arm(args: argparse.Namespace, arm: str, positions: str, seed: int, file: Path) -> dict:
    """Trains, or goes on training, one pattern from one seed, and evaluates it."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForMaskedLM.from_pretrained(file.parent / "converted", **ARMS[arm])
    model = model.to(args.device)
    source_rows = AutoConfig.from_pretrained(args.model).max_position_embeddings
    documents = read_pieces(args, args.length, tokenizer)
    if positions != "repeated":
        model.config.source_config = None  # nothing is known of repeated positions
    if positions == "unplaced":
        pieces = [pieces[0] for pieces in documents[:UNPLACED_PIECES]]
        choose_without_positions(model, pieces, source_rows, args.device)
    elif positions not in ("repeated", *OF_THE_CHOICE):
        set_positions(model, positions, source_rows)
    unseen = read_pieces(args, args.length, tokenizer, unseen=True)
    at_once = evaluate(model, unseen, tokenizer.mask_token_id, args)
    seconds = train(
        model, file, documents, args, steps=args.steps, seed=seed, size=1, far=FAR,
        rate=args.learning_rate,
    )  # fmt: skip
    found = evaluate(model, unseen, tokenizer.mask_token_id, args)
    if ARMS[arm]["attention_pattern"] == "adaptive":
        pieces = [pieces[0] for pieces in unseen[:8]]
        share = share_of_repeated_offsets(model, pieces, source_rows, args.device)
        found["share_of_repeated_offsets"] = share
    found |= {f"{name}_at_once": at_once[name] for name in ("far_bits", "far_accuracy", "bits")}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {**found, "seconds_per_step": seconds, "peak_mib": peak}


def table(cells: list[dict]) -> str:
    """Means over seeds; and over documents and seeds the difference of every arm to "adaptive" with
    the same positions, from the same source model.
    """
    head = (
        "source", "pattern", "positions", "seeds", "far words: bits at once", "bits",
        "more than adaptive", "accuracy", "all words: bits", "seconds per step", "peak MiB",
        "chosen at repeated offsets",
    )  # fmt: skip
    rows = [head, ["---"] * len(head)]
    own = {
        (cell["source"], cell["positions"], cell["seed"]): cell["far_bits_by_document"]
        for cell in cells
        if cell["arm"] == "adaptive"
    }
    sources = dict.fromkeys(cell["source"] for cell in cells)
    for source, positions, arm in itertools.product(sources, POSITIONS, ARMS):
        asked = (source, positions, arm)
        group = [c for c in cells if (c["source"], c["positions"], c["arm"]) == asked]
        if not group:
            continue
        mean = {
            name: statistics.mean(cell[name] for cell in group)
            for name, value in group[0].items()
            if isinstance(value, float)
        }
        pairs = [
            other - ours
            for cell in group
            if (source, positions, cell["seed"]) in own and arm != "adaptive"
            for other, ours in zip(
                cell["far_bits_by_document"], own[source, positions, cell["seed"]], strict=True
            )
        ]
        difference = "-"
        if len(pairs) > 1:
            error = statistics.stdev(pairs) / math.sqrt(len(pairs))
            difference = f"{statistics.mean(pairs):+.3f} ± {error:.3f}"
        repeated = mean.get("share_of_repeated_offsets")
        rows.append([
            source, arm, positions, str(len(group)), f"{mean['far_bits_at_once']:.2f}",
            f"{mean['far_bits']:.2f}", difference, f"{mean['far_accuracy']:.1%}",
            f"{mean['bits']:.2f}", f"{mean['seconds_per_step']:.2f}", f"{mean['peak_mib']:,.0f}",
            "-" if repeated is None else f"{repeated:.0%}",
        ])  # fmt: skip
    lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    documents = len(cells[0]["far_bits_by_document"])
    settings = cells[0]["settings"]
    return (
        f"{lines}\n\n{documents} unseen documents; ±: the standard error over documents and seeds. "
        f"{settings['steps']} steps of {settings['length']:,} tokens in {settings['dtype']}, after "
        f"{settings['source_steps']:,} steps of {SOURCE_BATCH} x 512 for the source."
    )


def main() -> int:
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    results = results_folder(args)
    folder, file = results / "masked_names", results / "masked_names.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "converted" / "config.json").exists():
        make_source(args, folder)
    names = ("length", "source_steps", "steps", "learning_rate", "dtype")
    settings = {name: getattr(args, name) for name in names}
    lines = file.read_text().splitlines() if file.exists() else []
    cells = [json.loads(line) for line in lines]
    if any(cell["settings"] != settings for cell in cells):
        print(f"{file} holds runs of other settings: move it away first", file=sys.stderr)
        return 2
    names = ("arm", "positions", "seed")
    done = [{name: cell[name] for name in names} for cell in cells]
    todo = [
        dict(zip(names, (arm, positions, seed), strict=True))
        for seed, positions, arm in itertools.product(args.seeds, args.positions, args.arms)
        if positions not in OF_THE_CHOICE or ARMS[arm]["attention_pattern"] == "adaptive"
    ]
    is_one = len(todo) == 1
    for run in (run for run in todo if run not in done):
        if is_one:
            state = folder / f"{run['arm']}-{run['positions']}-{run['seed']}.pt"
            cell = {**run, **run_arm(args, **run, file=state), "settings": settings}
            weights = (folder / "converted" / "model.safetensors").read_bytes()
            cell["source"] = hashlib.sha256(weights).hexdigest()[:8]
            cell["environment"] = environment(torch.device(args.device))
            with file.open("a") as out:
                out.write(json.dumps(cell) + "\n")
            state.unlink(missing_ok=True)
            return 0
        # What stands last counts.
        own = ["--arms", run["arm"], "--positions", run["positions"], "--seeds", str(run["seed"])]
        if status := subprocess.run([sys.executable, *sys.argv, *own], check=False).returncode:
            return status
    text = table([json.loads(line) for line in file.read_text().splitlines()])
    file.with_suffix(".md").write_text(f"{text}\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
