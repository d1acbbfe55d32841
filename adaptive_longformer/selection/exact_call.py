"""What the exact stage of the selection is asked, and what it answers."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from adaptive_longformer.selection.sampling import NO_SEED


class Places(NamedTuple):
    """What a coarser stage kept: places whose blocks are the candidates of a query block, beside
    those near it: from the first to the last one that the window covers and, under causality, from
    the place that it begins in.

    Attributes:
        numbers: int32 [batch, heads, query_blocks, width], in any order, none twice; anything
            beyond the count.
        counts: int32 [batch, heads, query_blocks]; -1 where all blocks are candidates.
        blocks_per_place: blocks of a place.
        most_blocks: blocks where all are candidates, at most.
        log_rest: float [batch, heads, query_length], the logarithm of the mass, as a sum of
            exp(scale q.k), that a query leaves in no place; -inf for none.
        weights: float, shape of numbers, for how many like it each was drawn; None: none was drawn.
    """

    numbers: torch.Tensor
    counts: torch.Tensor
    blocks_per_place: int
    most_blocks: int
    log_rest: torch.Tensor
    weights: torch.Tensor | None = None


@dataclass(frozen=True)
class ExactCall:
    """One call of the exact stage.

    Attributes:
        query: [batch, heads, query_length, head_dim], the last ones of the sequence, from the start
            of a query block on.
        key: [batch, key_heads, num_keys, head_dim], key_heads a divisor of heads: those of the
            sequence, behind them any others that `global_keys` names.
        length: tokens of the sequence.
        left, right: tokens that the window reaches to either side.
        num_blocks: blocks chosen per query block, at most.
        block_size, query_block_size: tokens.
        voters: bool [batch, length], the tokens that vote; None: all.
        key_counts: float or bool [batch, num_keys], of tokens that a key stands for; 0 for what is
            in no block, as padding and global tokens. None: 1.
        ends: int64 [batch], one more than the last token that is not padding; None: `length`.
        global_positions: int64 [batch, global tokens], ascending, filled up with `length`; None:
            there are none.
        global_keys: int64, shape of global_positions, the key of each; None: that of its position.
        is_causal: a block is chosen only if it ends before the query block begins, and by the
            queries of the query block before.
        scale: factor of the scores.
        tokens_per_key: how many tokens in a row a key stands for, a divisor of block_size.
        places: None: all blocks are candidates.
        means: under causality, where they are known: the means of every complete run of
            `TOKENS_PER_MEAN` keys [batch, key_heads, runs, head_dim], and what they count [batch,
            runs].
        shared_blocks: int [batch, heads, any number], not chosen as all query blocks read them
            anyway; -1 for none. None: there are none.
        sampling_seed: as of `SelectionOptions`.
    """

    query: torch.Tensor
    key: torch.Tensor
    length: int
    left: int
    right: int
    num_blocks: int
    block_size: int
    query_block_size: int
    voters: torch.Tensor | None = None
    key_counts: torch.Tensor | None = None
    ends: torch.Tensor | None = None
    global_positions: torch.Tensor | None = None
    global_keys: torch.Tensor | None = None
    is_causal: bool = False
    scale: float = 1.0
    tokens_per_key: int = 1
    places: Places | None = None
    means: tuple[torch.Tensor, torch.Tensor] | None = None
    shared_blocks: torch.Tensor | None = None
    sampling_seed: int = NO_SEED

    @property
    def num_rows(self) -> int:
        """Query blocks of `query`."""
        return -(-self.query.shape[2] // self.query_block_size)

    @property
    def num_drawn_rows(self) -> int:
        """Query blocks that draw what they read by chance."""
        return 0 if self.sampling_seed == NO_SEED else self.num_rows

    @property
    def first_row(self) -> int:
        """Query blocks of the sequence before those of `query`."""
        return (self.length - self.query.shape[2]) // self.query_block_size

    @property
    def num_key_blocks(self) -> int:
        """Blocks of the sequence."""
        # Of a length below 0 ONNX rounds the quotient up.
        return (self.length + self.block_size - 1) // self.block_size

    @property
    def num_sequence_keys(self) -> int:
        """Keys of the sequence."""
        return -(-self.length // self.tokens_per_key)

    @property
    def keys_per_block(self) -> int:
        """Keys of a block."""
        return self.block_size // self.tokens_per_key

    @property
    def near_width(self) -> int:
        """Blocks that are candidates beside those of places, at most."""
        assert self.places is not None
        reach = self.left + self.right + self.query_block_size
        width = reach // self.block_size + 2 + self.places.blocks_per_place
        return min(width, self.num_key_blocks)

    @property
    def num_placed(self) -> int:
        """Candidates of a query block whose places count, at most; 0: there are no places."""
        if self.places is None:
            return 0
        return self.places.numbers.shape[-1] * self.places.blocks_per_place + self.near_width

    @property
    def num_candidates(self) -> int:
        """Candidates of any query block, at most."""
        most = self.num_key_blocks if self.places is None else self.places.most_blocks
        return max(self.num_placed, most)

    @property
    def dtype(self) -> torch.dtype:
        """Of masses."""
        return torch.promote_types(self.query.dtype, torch.float32)


class ExactChoice(NamedTuple):
    """What query blocks chose, best first; of blocks of the same rank the first one first. Of
    blocks that are drawn the one of the largest priority is the best.

    Attributes:
        key_blocks: int32 [batch, heads, query_blocks, num_blocks]; 0 beyond the count. In any order
            where `log_dropped` was asked for.
        counts: int32 [batch, heads, query_blocks].
        mass: float, shape of key_blocks; 0 beyond the count. Of places that were drawn the mass of
            the block times the weight of its place, where `log_weights` are not there yet.
        covered: float [batch, heads, query_blocks], the mass of what is read anyway: global tokens,
            shared blocks and those that the window covers.
        share: float [batch, heads, query_blocks, blocks], the mass of every block; without
            blocks unless asked for.
        log_dropped: float [batch, heads, query_length], the logarithm of the mass, as a sum of
            exp(scale q.k), that a query leaves neither chosen nor covered, -inf for one that does
            not vote; without queries unless asked for.
        threshold: float [batch, heads, query_blocks], the largest priority that is not chosen, 0
            where there is none; without query blocks unless blocks are drawn.
        log_weights: float, shape of mass, the logarithms of the numbers of blocks that each stands
            for, 0 beyond the count; without query blocks unless `exact_choice` draws them.
    """

    key_blocks: torch.Tensor
    counts: torch.Tensor
    mass: torch.Tensor
    covered: torch.Tensor
    share: torch.Tensor
    log_dropped: torch.Tensor
    threshold: torch.Tensor
    log_weights: torch.Tensor


def empty_choice(call: ExactCall, with_share: bool, with_dropped: bool) -> ExactChoice:
    """Nothing is chosen."""
    batch, heads, length = call.query.shape[:3]
    shape = (batch, heads, call.num_rows)
    new = call.query.new_zeros
    return ExactChoice(
        new(*shape, call.num_blocks, dtype=torch.int32),
        new(*shape, dtype=torch.int32),
        new(*shape, call.num_blocks, dtype=call.dtype),
        new(*shape, dtype=call.dtype),
        new(*shape, call.num_key_blocks if with_share else 0, dtype=call.dtype),
        new(batch, heads, length if with_dropped else 0, dtype=call.dtype).fill_(-torch.inf),
        new(batch, heads, call.num_drawn_rows, dtype=call.dtype),
        new(batch, heads, 0, call.num_blocks, dtype=call.dtype),
    )
