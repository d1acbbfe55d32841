"""How blocks are chosen: sizes, limits, and what one call asks for."""

from dataclasses import astuple, dataclass

from adaptive_longformer.selection.sampling import NO_SEED

# Key blocks are multiples of it, so that the means of a coarser stage divide them.
BLOCK_STEP = 4


@dataclass(frozen=True)
class SelectionOptions:
    """How blocks are chosen.

    Attributes:
        num_blocks: blocks chosen per query block, at most.
        block_size: tokens per key block, a multiple of 4.
        query_block_size: tokens per query block.
        num_global_blocks: blocks chosen for all query blocks of a row together.
        num_candidates: about how many keys every query meets one by one: those of the places that
            have the largest mass as far as means of keys tell, see `exact_choice`; in rows that
            have at most twice as many, all. More find more, at more cost.
        sampling_seed: from 0 on: blocks are drawn by chance in proportion to their mass and stand
            for those that are not, see selection/sampling.py. -1: those with the largest are taken.

    Raises:
        ValueError: a number is out of range.
    """

    num_blocks: int = 32
    block_size: int = 16
    query_block_size: int = 16
    num_global_blocks: int = 0
    num_candidates: int = 2048
    sampling_seed: int = NO_SEED

    def __post_init__(self) -> None:
        at_least = dict.fromkeys(("num_blocks", "query_block_size", "num_candidates"), 1)
        for name, least in (at_least | {"num_global_blocks": 0, "sampling_seed": NO_SEED}).items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"SelectionOptions: {name} is {value}, at least {least} is needed")
        if self.block_size < BLOCK_STEP or self.block_size % BLOCK_STEP:
            raise ValueError(
                f"SelectionOptions: block_size is {self.block_size}, a multiple of {BLOCK_STEP} is "
                "needed"
            )


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
