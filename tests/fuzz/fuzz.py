"""Seeded random calls, right and wrong: `python tests/fuzz/fuzz.py --cases 20000 --seed 0`.

Every case is one of

- "error": refused by a ValueError or TypeError of ours, in one line that names an argument;
- "right": equal to backend "reference" in float64, or to what was given;
- "traceback": any other exception;
- "difference": a result that is not right;
- "crash" and "hang": the process of a chunk of cases died, or ran out of time.

None of the last four may occur. A case is a function of the seed and its number alone, and
`--first N --cases 1` runs number N.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import AutoConfig, AutoModelForMaskedLM
from transformers.utils import logging

from adaptive_longformer import (
    AdaptiveSparseConfig,
    AdaptiveSparseModel,
    AdaptiveSparseSeq2SeqConfig,
    convert_checkpoint,
)
from adaptive_longformer.attention import AttentionSpan, GlobalProjections, sparse_attention
from adaptive_longformer.patterns import (
    BigBird,
    BlockLayout,
    EntryFlag,
    Fixed,
    Full,
    GlobalTokens,
    Pattern,
    RandomBlocks,
    SlidingWindow,
    Strided,
    block_layout,
    pattern_from_code,
)

ROOT = Path(__file__).resolve().parents[2]
BAD = ("traceback", "difference", "crash", "hang")
CHUNK = 500
# Of the processor for one case, and in all for a chunk.
CASE_SECONDS, CHUNK_SECONDS = 30, 600
# What nobody means, in place of any argument.
ODD: list[Any] = [
    None, True, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, float("nan"), float("inf"),
    1j, "", "text", b"x", "\ud800", [], [1], (), (1, 2), {}, {"a": 1}, set(), object(), int,
    torch.zeros(()), torch.ones(2, 3), torch.zeros(0), torch.ones(1, 2, 3, 4, dtype=torch.int64),
    torch.zeros(2, 2, dtype=torch.complex64), torch.zeros(1, 2, 70, 8, device="meta"),
]  # fmt: skip


class DifferenceError(Exception):
    """A result is not right; the message says which and by how much."""


def is_ours(error: Exception) -> bool:
    """Whether an error was raised by the package to say what is wrong.

    Also those of the fields' types, which the configurations leave to Hugging Face's dataclasses.
    """
    if type(error).__name__.startswith("StrictDataclass"):
        return True
    frame = traceback.extract_tb(error.__traceback__)[-1]
    is_raised_here = (frame.line or "").startswith("raise ") and ROOT in Path(
        frame.filename
    ).parents
    return isinstance(error, ValueError | TypeError | OSError) and is_raised_here


def of_patterns(draw: random.Random) -> None:
    """Construction of patterns and their lists of blocks."""
    pattern = some_pattern(draw, odd=0.3)
    if pattern_from_code(pattern.code) != pattern:
        raise DifferenceError("another pattern comes back from its code")
    length = draw.choice([1, 2, 63, 64, 65, 150, *draw.choices(ODD, k=1)])
    sizes = {
        name: draw.choice([8, 16, 64, 128, *draw.choices([*ODD, 7, 129], k=draw.random() < 0.3)])
        for name in ("query_block_size", "key_block_size")
    }
    layout = block_layout(pattern, length, num_heads=2, **sizes)
    layout.validate()
    token = torch.arange(length)
    heads = torch.arange(layout.key_blocks.shape[1])[:, None, None]
    local = [part for part in pattern.parts if not isinstance(part, GlobalTokens)]
    allowed = torch.zeros(heads.shape[0], length, length, dtype=torch.bool)
    for part in local:
        allowed |= part.allowed(token[:, None], token, heads, length)
    listed = torch.zeros(heads.shape[0], layout.num_query_blocks, layout.num_key_blocks)
    ids = layout.key_blocks[0].long().where(layout.used[0], 0)
    listed.scatter_add_(2, ids, layout.used[0].float())
    rows, columns = token // layout.query_block_size, token // layout.key_block_size
    if (allowed & (listed[:, rows][:, :, columns] == 0)).any():
        raise DifferenceError("a key that the pattern allows is in no list")


def some_pattern(draw: random.Random, odd: float = 0.0) -> Pattern:
    def number(low: int = 1, high: int = 40) -> Any:
        if draw.random() < odd:
            return draw.choice(ODD)
        return draw.choice([draw.randint(low, high), draw.choice([low, 2**31 - 1])])

    makers: list[Callable[[], Pattern]] = [
        Full,
        lambda: SlidingWindow(number(0)),
        lambda: SlidingWindow(number(0), number(0)),
        lambda: SlidingWindow(number(0), dilation=number(1, 4)),
        lambda: SlidingWindow(number(0), dilation=(number(1, 4), number(1, 4))),
        lambda: Strided(number()),
        lambda: Fixed(number(8), number(1, 8)),
        lambda: RandomBlocks(number(1, 4), number(1, 32), number(0)),
        lambda: BigBird(draw.choice([8, 16]) if draw.random() > odd else number(), number(1, 2)),
        lambda: SlidingWindow(2) | GlobalTokens((number(0), number(0, 80))),
    ]
    pattern = draw.choice(makers)()
    if draw.random() < 0.3:
        pattern = pattern | draw.choice(makers)()
    return pattern


def some_layout(draw: random.Random, length: int) -> BlockLayout:
    """Random entries beside those of a pattern, with a bias."""
    sizes = {f"{name}_block_size": draw.choice([8, 16, 64]) for name in ("query", "key")}
    base = block_layout(SlidingWindow(draw.randint(0, 20)), length, **sizes)
    seen = torch.zeros(*base.counts.shape, base.num_key_blocks)
    more = torch.rand(seen.shape, generator=generator(draw)) < 0.3
    ids = torch.arange(base.num_key_blocks, dtype=torch.int32).expand(seen.shape)
    layout = replace(
        base,
        key_blocks=torch.cat([base.key_blocks, ids], dim=-1),
        flags=torch.cat(
            [base.flags.where(base.used, 0), more.int() * int(EntryFlag.SELECTED)], dim=-1
        ),
        counts=torch.full_like(base.counts, base.key_blocks.shape[-1] + base.num_key_blocks),
    )
    layout = layout.select(layout.flags != 0)
    bias = torch.randn(layout.key_blocks.shape, generator=generator(draw))
    taken = torch.rand(bias.shape, generator=generator(draw)) < 0.1
    return replace(layout, bias=bias.masked_fill(taken, draw.choice([-torch.inf, -1e4, 0.0])))


def generator(draw: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(draw.randrange(2**62))


def of_calls(draw: random.Random) -> None:
    """Calls of the operator."""
    batch, heads = draw.choice([1, 1, 2]), 2
    length = draw.choice([1, 2, 7, 8, 63, 64, 65, draw.randint(1, 140)])
    head_dim = draw.choice([1, 3, 8, 16])

    def tensor(*shape: int) -> torch.Tensor:
        value = torch.randn(*shape, generator=generator(draw))
        kind = draw.random()
        if kind < 0.1:  # memory that is shared, or has holes
            return value.transpose(-1, -2).contiguous().transpose(-1, -2)
        if kind < 0.2:
            return value[..., :1, :].expand_as(value)
        return value

    def mask(share: float) -> torch.Tensor:
        return torch.rand(batch, length, generator=generator(draw)) < share

    key_heads = draw.choice([1, 2])
    call: dict[str, Any] = {
        "query": tensor(batch, heads, length, head_dim),
        "key": tensor(batch, key_heads, length, head_dim),
        "value": tensor(batch, key_heads, length, head_dim),
        "is_causal": draw.random() < 0.4,
        "return_lse": draw.random() < 0.4,
    }
    if draw.random() < 0.6:
        call["pattern_or_layout"] = some_pattern(draw)
    else:
        call["pattern_or_layout"] = layout = some_layout(draw, length)
        if draw.random() < 0.4:
            call["entry_bias"] = torch.randn(
                1, heads, *layout.key_blocks.shape[2:], generator=generator(draw)
            )
        if draw.random() < 0.4:
            span = torch.rand(heads, generator=generator(draw)) * 20
            call["span"] = AttentionSpan(span, draw.choice([1.0, 5.0]))
    options: dict[str, Callable[[], Any]] = {
        "attention_mask": lambda: mask(draw.choice([0.0, 0.5, 0.9, 1.0])),
        "global_mask": lambda: mask(draw.choice([0.0, 0.05, 1.0])),
        "max_global_tokens": lambda: draw.randint(0, 4),
        "scale": lambda: draw.choice([0.0, 1.0, -0.5, 3]),
        "dropout_p": lambda: draw.choice([0.0, 0.1, 0.9]),
        "global_qkv": lambda: draw.choice(
            [
                tuple(tensor(batch, heads, length, head_dim) for _ in range(3)),
                GlobalProjections(
                    tensor(batch, length, 6),
                    *[tensor(heads * head_dim, 6), tensor(1, heads * head_dim)[0]] * 3,
                ),
            ]
        ),
    }
    for name, make in options.items():
        if draw.random() < 0.3:
            call[name] = make()
    if call.get("dropout_p"):
        call["dropout_seed"] = torch.tensor(draw.randrange(2**63))
    is_odd = draw.random() < 0.35
    if is_odd:
        name = draw.choice([*call, "entry_bias", "span", "scale", "global_qkv", "backend"])
        call[name] = draw.choice(ODD)
    elif draw.random() < 0.2:
        row = call[draw.choice(["query", "key", "value"])] = call["value"].clone()
        if row.shape[1] == heads or key_heads == heads:
            row[0, 0, draw.randrange(length), 0] = draw.choice([torch.nan, torch.inf, 1e4])
    compare(draw, call)


def compare(draw: random.Random, call: dict[str, Any]) -> None:
    """A call on some backend, with the same on "reference" in float64."""

    def exact(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.double() if value.is_floating_point() else value
        if isinstance(value, BlockLayout):
            return replace(value, bias=exact(value.bias))
        if isinstance(value, tuple):
            parts = [exact(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value

    def most(tensor: torch.Tensor | None) -> float:
        if tensor is None or tensor.numel() == 0:
            return 0.0
        return float(tensor.nan_to_num(0, 0, 0).abs().max())

    call = {"backend": draw.choice(["auto", "auto", "sdpa", "cpp", "blocked", "blocked"]), **call}
    actual = sparse_attention(**call)
    expected = sparse_attention(
        **{**{k: exact(v) for k, v in call.items()}, "backend": "reference"}
    )
    if abs(call.get("scale") or 0) > 100:
        return  # the largest score takes all, and which one that is differs with the rounding
    # Scores, and biases beside them, have the rounding of their size.
    size = most(call["query"]) * most(call["key"]) * abs(call.get("scale") or 1)
    size += most(call.get("entry_bias")) + most(getattr(call["pattern_or_layout"], "bias", None))
    tolerance = 1e-4 + size * 2**-22
    results = [value if isinstance(value, tuple) else (value,) for value in (actual, expected)]
    for name, found, wanted in zip(("output", "lse"), *results, strict=False):
        try:
            torch.testing.assert_close(
                found.double(), wanted.double(), atol=tolerance, rtol=tolerance, equal_nan=True
            )
        except AssertionError as error:
            raise DifferenceError(f"{call['backend']}: {name}: {error}") from None


JSON_VALUES = [value for value in ODD if type(value) in (int, str, list, dict, float, bool)]
CONFIG: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 200, "attention_window": 32,
}  # fmt: skip
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 97, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "attention_window": 32,
}  # fmt: skip


def of_configurations(draw: random.Random) -> None:
    """Configurations with fields that nobody means, and models of those that are accepted."""
    config_class, fields = draw.choice(
        [(AdaptiveSparseConfig, CONFIG), (AdaptiveSparseSeq2SeqConfig, SEQ2SEQ)]
    )
    fields = dict(fields)
    ours = {name for cls in config_class.__mro__[:2] for name in cls.__annotations__}
    names = sorted(ours & set(config_class().to_dict()))
    for name in draw.sample(names, draw.choice([0, 1, 1, 2])):
        fields[name] = draw.choice(JSON_VALUES)
    config = config_class(**fields)
    again = config_class.from_dict(json.loads(config.to_json_string()))
    if again.to_dict() != config.to_dict():
        raise DifferenceError("another configuration comes back from its JSON")
    if config_class is AdaptiveSparseConfig and config.hidden_size * config.vocab_size < 10**6:
        if config.num_hidden_layers > 4 or config.max_position_embeddings > 10**5:
            return
        model = AdaptiveSparseModel(config).eval()
        length = min(20, config.max_sequence_length, config.vocab_size)
        with torch.no_grad():
            output = model(torch.arange(length)[None] % config.vocab_size)[0]
        if output.shape != (1, length, config.hidden_size):
            raise DifferenceError(f"hidden states of shape {tuple(output.shape)}")


SOURCES: dict[str, dict[str, Any]] = {
    "longformer": {"attention_window": [16], "max_position_embeddings": 66},
    "big_bird": {"block_size": 8, "num_random_blocks": 1, "max_position_embeddings": 64},
    "roberta": {"max_position_embeddings": 66},
    "bert": {"max_position_embeddings": 64},
}


def of_conversions(draw: random.Random) -> None:
    """Conversions of tiny checkpoints, some with a changed config.json."""
    model_type = draw.choice(list(SOURCES))
    sizes = {**CONFIG, "pad_token_id": 1, **SOURCES[model_type]}
    if model_type != "longformer":
        del sizes["attention_window"]
    config = AutoConfig.for_model(model_type, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source"), Path(folder, "target")
        torch.manual_seed(draw.randrange(2**31))
        model = AutoModelForMaskedLM.from_config(config).eval()
        model.save_pretrained(source)
        if draw.random() < 0.7:
            file = source / "config.json"
            raw = json.loads(file.read_text())
            raw[draw.choice(list(raw))] = draw.choice(JSON_VALUES)
            file.write_text(draw.choice(["", "[1]", "{", "null", *[json.dumps(raw)] * 20]))
            convert_checkpoint(source, target, verify=True)
            return
        convert_checkpoint(source, target)
        ids = torch.randint(5, 97, (1, draw.choice([1, 17, 60])), generator=generator(draw))
        with torch.no_grad():
            ours = AutoModelForMaskedLM.from_pretrained(target).eval()(ids).logits
            theirs = model(ids).logits
        if not torch.allclose(ours, theirs, atol=1e-5):
            raise DifferenceError(f"logits differ by {float((ours - theirs).abs().max())}")


# With how often they are drawn.
KINDS = {of_calls: 60, of_patterns: 25, of_configurations: 12, of_conversions: 3}


class Outcome(NamedTuple):
    number: int
    kind: str
    outcome: str
    detail: str


def run_case(seed: int, number: int) -> Outcome:
    draw = random.Random(f"{seed} {number}")
    kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
    report = partial(Outcome, number, kind.__name__)
    try:
        kind(draw)
    except DifferenceError as difference:
        return report("difference", str(difference))
    except Exception as error:  # whatever it is, it is counted
        outcome = "error" if is_ours(error) else "traceback"
        return report(outcome, f"{type(error).__name__}: {error}")
    return report("right", "")


def run_chunk(seed: int, first: int, cases: int) -> None:
    """Prints a line of JSON for every case; in a process of its own."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    for number in range(first, first + cases):
        signal.setitimer(signal.ITIMER_PROF, CASE_SECONDS)
        print(json.dumps(run_case(seed, number)), flush=True)


def run(seed: int, first: int, cases: int) -> Iterator[Outcome]:
    """All outcomes. After a crash or a hang the chunk goes on behind the case."""
    end = first + cases
    while first < end:
        count = min(CHUNK, end - first)
        chunk = ["--chunk", "--seed", str(seed), "--first", str(first), "--cases", str(count)]
        with tempfile.TemporaryFile("w+") as output:
            try:
                status = subprocess.run(
                    [sys.executable, __file__, *chunk], stdout=output, check=False,
                    stderr=subprocess.DEVNULL, timeout=CHUNK_SECONDS,
                ).returncode  # fmt: skip
                ended = ("crash", f"exit status {status}") if status else None
                if status == -signal.SIGPROF:
                    ended = ("hang", f"not done after {CASE_SECONDS} s of the processor")
            except subprocess.TimeoutExpired:
                ended = ("hang", f"not done after {CHUNK_SECONDS} s")
            output.seek(0)
            for line in output:
                yield Outcome(*json.loads(line))
                first += 1
        if ended is not None:
            yield Outcome(first, "?", *ended)
            first += 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--chunk", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.chunk:
        run_chunk(args.seed, args.first, args.cases)
        return 0
    counts: Counter[tuple[str, str]] = Counter()
    for outcome in run(args.seed, args.first, args.cases):
        counts[outcome.kind, outcome.outcome] += 1
        if outcome.outcome in BAD or args.cases == 1:
            print(f"{outcome.number} {outcome.kind} {outcome.outcome}: {outcome.detail}")
    for (kind, name), count in sorted(counts.items()):
        print(f"{kind:20} {name:12} {count:6}")
    return int(any(name in BAD for _, name in counts))


if __name__ == "__main__":
    sys.exit(main())
