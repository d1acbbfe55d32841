"""How blocks are chosen: sizes, limits, and what one call asks for."""

from dataclasses import astuple, dataclass

from adaptive_longformer.selection.pyramid import FAN_OUT

# Nodes that a search starts from, nodes it keeps per level, and queries averaged into one vote.
START_NODES, BEAM_WIDTH, TOKENS_PER_VOTE = 256, 64, 4


@dataclass(frozen=True)
class SelectionOptions:
    """How blocks are chosen.

    Attributes:
        num_blocks: blocks chosen per query block, at most.
        block_size: tokens per key block, a multiple of 4.
        query_block_size: tokens per query block, a multiple of `tokens_per_vote`.
        start_nodes: nodes that the search may start from; rows with no more blocks are searched
            exactly.
        beam_width: nodes kept per level.
        tokens_per_vote: queries averaged into one sub-query; 1 lets every token vote.
        num_global_blocks: blocks chosen for all query blocks of a row together.
        sub_block_size: keys averaged into one summary when blocks are compared, a divisor of
            `block_size`; 0: a quarter of a block. Fewer find smaller things, at more cost.
        num_candidates: about how many keys every query meets one by one, see `exact_choice`: all
            of them in rows that have no more. 0: blocks are compared by summaries, with
            `sub_block_size`, `tokens_per_vote` and the search of `start_nodes` and `beam_width`.

    Raises:
        ValueError: a number is out of range, or the sizes do not nest.
    """

    num_blocks: int = 8
    block_size: int = 64
    query_block_size: int = 64
    start_nodes: int = START_NODES
    beam_width: int = BEAM_WIDTH
    tokens_per_vote: int = TOKENS_PER_VOTE
    num_global_blocks: int = 0
    sub_block_size: int = 0
    num_candidates: int = 0

    def __post_init__(self) -> None:
        positive = ("num_blocks", "start_nodes", "beam_width", "tokens_per_vote")
        at_least = dict.fromkeys(positive, 1) | {"num_global_blocks": 0, "num_candidates": 0}
        for name, least in at_least.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"SelectionOptions: {name} is {value}, at least {least} is needed")
        if self.block_size < FAN_OUT or self.block_size % FAN_OUT:
            raise ValueError(
                f"SelectionOptions: block_size is {self.block_size}, a multiple of {FAN_OUT} is "
                "needed"
            )
        size = self.sub_block_size
        if size < 0 or (size and self.block_size % size):
            raise ValueError(
                f"SelectionOptions: sub_block_size is {size}, a divisor of block_size = "
                f"{self.block_size}, or 0 for a quarter of it, is needed"
            )
        if self.query_block_size < 1 or self.query_block_size % self.tokens_per_vote:
            raise ValueError(
                f"SelectionOptions: query_block_size is {self.query_block_size}, a multiple of "
                f"tokens_per_vote = {self.tokens_per_vote} is needed"
            )

    @property
    def sub_blocks(self) -> int:
        """Summaries per block."""
        return self.block_size // self.sub_block_size if self.sub_block_size else FAN_OUT

    def fan_out(self, level: int) -> int:
        """Children of a node of a level."""
        return self.sub_blocks if level == 1 else FAN_OUT

    def start_level(self, num_blocks: int) -> int:
        """The finest level at which a row of `num_blocks` blocks has at most `start_nodes`
        nodes.
        """
        level = 1
        while ceil_div(num_blocks, blocks_per_node(level)) > self.start_nodes:
            level += 1
        return level

    def visited_nodes(self, num_blocks: int) -> int:
        """Nodes that one query block of such a row scores as candidates, all levels together."""
        level = self.start_level(num_blocks)
        start = ceil_div(num_blocks, blocks_per_node(level))
        return start + (level - 1) * min(start, self.beam_width) * FAN_OUT


@dataclass(frozen=True)
class SelectionCall:
    """What one call asks for, besides its tensors.

    Attributes:
        options: sizes and limits.
        left, right: tokens that the window covers before and after a query.
        is_causal, scale: as in `select_blocks`.
        max_global_tokens: how many global tokens a sequence may have where nothing may be read
            back from the device; None: it may.
    """

    options: SelectionOptions
    left: int
    right: int
    is_causal: bool
    scale: float
    max_global_tokens: int | None = None

    def numbers(self) -> list[int]:
        """All but the scale as whole numbers, for the schema of an operator."""
        most = -1 if self.max_global_tokens is None else self.max_global_tokens
        return [self.left, self.right, int(self.is_causal), most, *astuple(self.options)]

    @classmethod
    def from_numbers(cls, numbers: list[int], scale: float) -> "SelectionCall":
        """The call whose `numbers` these are."""
        left, right, is_causal, most, *options = numbers
        return cls(
            SelectionOptions(*options), left, right, bool(is_causal), scale,
            None if most < 0 else most,
        )  # fmt: skip


def blocks_per_node(level: int) -> int:
    """How many blocks a node of a level of the pyramid covers; level 1 has the blocks."""
    return FAN_OUT ** (level - 1)


def ceil_div(numerator: int, denominator: int) -> int:
    """The quotient, rounded up."""
    return -(-numerator // denominator)
