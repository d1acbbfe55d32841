"""Arithmetic of an encoder with full attention and with ours, counted, not timed.

    python benchmarks/cost_model.py

A multiplication and an addition count as two operations. Our attention is counted in the blocks it
reads; the selection in the scores that it computes, as if products of bytes cost what others do.
"""

import argparse
from dataclasses import dataclass, replace

from adaptive_longformer.selection.exact import (
    ALL_PER_CANDIDATE,
    MEANS_PER_MEAN,
    TOKENS_PER_MEAN,
)
from adaptive_longformer.selection.options import SelectionOptions


@dataclass(frozen=True)
class Encoder:
    """A BERT-like encoder and the options of its adaptive selection; sizes in tokens."""

    hidden_size: int = 768
    num_layers: int = 12
    attention_window: int = 512
    num_global_tokens: int = 1
    options: SelectionOptions = SelectionOptions()  # noqa: RUF009, frozen too

    def projections(self, length: int) -> float:
        """Query, key, value, output and the feed-forward layers."""
        return self.num_layers * 24 * length * self.hidden_size**2

    def full_attention(self, length: int) -> float:
        """Scores and weighted sums of every pair."""
        return self.num_layers * 4 * length**2 * self.hidden_size

    def keys_per_query(self, length: int) -> float:
        """Keys in the tiles that a query's block reads; never more than there are."""
        blocks_of_window = self.attention_window // self.options.block_size + 1
        blocks = blocks_of_window + self.options.num_blocks
        return min(float(length), blocks * self.options.block_size + self.num_global_tokens)

    def sparse_attention(self, length: int) -> float:
        """Scores and weighted sums of the executed tiles, and the rows of global queries."""
        local = 4 * length * self.keys_per_query(length) * self.hidden_size
        global_rows = 4 * self.num_global_tokens * length * self.hidden_size
        return self.num_layers * (local + global_rows)

    def scores_per_query(self, length: int) -> float:
        """Keys that a query meets in the choice, and means in its coarser stages."""
        found, keys, run = 0.0, float(length), TOKENS_PER_MEAN
        while keys > ALL_PER_CANDIDATE * self.options.num_candidates:
            found += self.options.num_candidates + self.attention_window
            keys, run = keys / run, MEANS_PER_MEAN
        return found + keys

    def selection(self, length: int) -> float:
        """One score for every key or mean that a query meets, and the means."""
        return self.num_layers * self.hidden_size * 2 * length * (self.scores_per_query(length) + 1)

    def full(self, length: int) -> float:
        return self.projections(length) + self.full_attention(length)

    def sparse(self, length: int) -> float:
        return self.projections(length) + self.sparse_attention(length) + self.selection(length)

    def shortest_saving_half(self, only_attention: bool) -> int:
        """The shortest length, in blocks, from which at most half of the operations remain."""
        length = self.options.block_size
        while True:
            ours = self.sparse_attention(length) + self.selection(length)
            theirs = self.full_attention(length)
            rest = 0.0 if only_attention else self.projections(length)
            if ours + rest <= 0.5 * (theirs + rest):
                return length
            length += self.options.block_size


def table(encoder: Encoder, lengths: list[int]) -> str:
    lines = [
        "| tokens | full attention | ours | of it selection | ours / full, attention |"
        " ours / full, whole encoder | scores per query in the choice |",
        "|---|---|---|---|---|---|---|",
    ]
    for length in lengths:
        full, selection = encoder.full_attention(length), encoder.selection(length)
        ours = encoder.sparse_attention(length) + selection
        whole = encoder.sparse(length) / encoder.full(length)
        lines.append(
            f"| {length:,} | {full / 1e12:.2f} TFLOP | {ours / 1e12:.2f} TFLOP |"
            f" {selection / ours:.0%} | {ours / full:.0%} | {whole:.0%} |"
            f" {encoder.scores_per_query(length):,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--selected-blocks", type=int, default=SelectionOptions().num_blocks)
    args = parser.parse_args()
    encoder = Encoder(
        hidden_size=args.hidden_size,
        num_layers=args.layers,
        options=replace(SelectionOptions(), num_blocks=args.selected_blocks),
    )
    print(table(encoder, args.lengths))
    print(
        f"\nHalf of the operations are saved from {encoder.shortest_saving_half(True):,} tokens on"
        f" (attention alone) and from {encoder.shortest_saving_half(False):,} (whole encoder)."
    )


if __name__ == "__main__":
    main()
