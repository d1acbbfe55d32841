"""Ragged lists of key blocks, one list per query block: the format that every sparse backend
shares.
"""

from dataclasses import dataclass, field, replace
from enum import IntFlag
from functools import lru_cache

import torch

from adaptive_longformer.patterns.cached_tensors import kept_in_graphs, ready_for_every_stream
from adaptive_longformer.patterns.full import Full
from adaptive_longformer.patterns.global_tokens import GlobalTokens
from adaptive_longformer.patterns.pattern import LARGEST, Pattern, check_types, check_whole, union
from adaptive_longformer.patterns.sliding_window import SlidingWindow

MIN_BLOCK_SIZE = 8
MAX_BLOCK_SIZE = 128
_WHOLE_NUMBERS = (torch.int32, torch.int64)


class EntryFlag(IntFlag):
    """What a kernel must do for one entry of a list.

    The token mask of an entry is the window for WINDOW, the pattern outside the window for PATTERN,
    and everything outside the window for SELECTED; FULL says that this mask is known to be all True
    for the whole tile, so that no mask code needs to run. GLOBAL_PACK marks a block of packed
    global keys; backends set it on their own copies.
    """

    FULL = 1
    WINDOW = 2
    GLOBAL_PACK = 16
    SELECTED = 32
    PATTERN = 64


@dataclass(frozen=True)
class BlockLayout:
    """For every query block the list of key blocks that it reads.

    A key j is visible to a query i iff the list of i's block has an entry for j's block whose token
    mask lets (i, j) through. No pair (i, j) is let through by two entries: each key counts once in
    the softmax.

    Attributes:
        key_blocks: int32 [batch or 1, heads or 1, num_query_blocks, max_entries], ids of key
            blocks; what lies at or beyond the row's count is padding and is never read.
        counts: int32 [batch or 1, heads or 1, num_query_blocks], entries used per row.
        flags: int32, shape of key_blocks, `EntryFlag` bits.
        bias: float, shape of key_blocks, or None: added to all scores of the entry. WINDOW entries
            take none.
        query_block_size, key_block_size: in tokens, 8 to 128.
        length: tokens in the sequence; the last block may be incomplete.
        window: what the WINDOW entries mean, and what SELECTED and PATTERN entries leave out;
            without holes. Every list has a WINDOW entry for each block that it touches; only those
            may be missing in which an `AttentionSpan` hides everything.
        pattern: what the PATTERN entries mean.
        is_checked: whether `check_once` has nothing left to do; a changed copy is unchecked again.
    """

    key_blocks: torch.Tensor
    counts: torch.Tensor
    flags: torch.Tensor
    query_block_size: int
    key_block_size: int
    length: int
    window: SlidingWindow | None = None
    pattern: Pattern | None = None
    bias: torch.Tensor | None = None
    is_checked: bool = field(default=False, init=False, repr=False, compare=False)

    @property
    def num_query_blocks(self) -> int:
        return -(-self.length // self.query_block_size)

    @property
    def num_key_blocks(self) -> int:
        return -(-self.length // self.key_block_size)

    @property
    def used(self) -> torch.Tensor:
        """Boolean, shape of key_blocks: which entries are not padding."""
        position = torch.arange(self.key_blocks.shape[-1], device=self.counts.device)
        return position < self.counts[..., None]

    def validate(self) -> None:
        """Checks shapes, ids and uniqueness; meant to be called once, on a layout made by hand.

        Raises:
            ValueError: names the attribute, its value and what is allowed.
        """
        self._check_types()
        if self.key_blocks.ndim != 4 or self.key_blocks.shape[2] != self.num_query_blocks:
            raise ValueError(
                f"BlockLayout: key_blocks has shape {tuple(self.key_blocks.shape)}, "
                f"[batch or 1, heads or 1, {self.num_query_blocks}, max_entries] is needed"
            )
        expected = {"counts": self.key_blocks.shape[:3], "flags": self.key_blocks.shape}
        if self.bias is not None:
            expected["bias"] = self.key_blocks.shape
        for argument, shape in expected.items():
            if getattr(self, argument).shape != shape:
                raise ValueError(
                    f"BlockLayout: {argument} has shape {tuple(getattr(self, argument).shape)}, "
                    f"{tuple(shape)} is needed"
                )
        if (
            self.counts.numel()
            and not 0
            <= int(self.counts.min())
            <= int(self.counts.max())
            <= self.key_blocks.shape[3]
        ):
            raise ValueError(
                f"BlockLayout: counts go from {int(self.counts.min())} to "
                f"{int(self.counts.max())}, "
                f"0 to max_entries = {self.key_blocks.shape[3]} is allowed"
            )
        ids = self.key_blocks[self.used]
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_key_blocks:
            raise ValueError(
                f"BlockLayout: key_blocks has ids from {int(ids.min())} to {int(ids.max())}, "
                f"0 to {self.num_key_blocks - 1} is allowed"
            )
        for name, flag in (("window", EntryFlag.WINDOW), ("pattern", EntryFlag.PATTERN)):
            if getattr(self, name) is None and bool(((self.flags & flag) != 0)[self.used].any()):
                raise ValueError(
                    f"BlockLayout: flags has {name.upper()} entries and {name} is None, which says "
                    "what they mean"
                )
        # A window entry and one other entry of the same block complement each other; more would
        # count keys twice.
        is_window = (self.flags & EntryFlag.WINDOW) != 0
        for kind, members in (("WINDOW", is_window), ("SELECTED or PATTERN", ~is_window)):
            hits = self._times_listed(members)
            if hits.numel() and int(hits.max()) > 1:
                raise ValueError(
                    f"BlockLayout: key_blocks lists a block twice as {kind} for one query block, "
                    "once is allowed"
                )

    def _check_types(self) -> None:
        check_block_sizes(
            "BlockLayout",
            query_block_size=self.query_block_size,
            key_block_size=self.key_block_size,
        )
        check_whole("BlockLayout", 0, length=self.length)
        for argument in ("key_blocks", "counts", "flags", "bias"):
            tensor, is_bias = getattr(self, argument), argument == "bias"
            if is_bias and tensor is None:
                continue
            check_types({f"BlockLayout: {argument}": tensor}, torch.Tensor, "a tensor")
            fits = tensor.is_floating_point() if is_bias else tensor.dtype in _WHOLE_NUMBERS
            if not fits or tensor.device != self.key_blocks.device:
                raise ValueError(
                    f"BlockLayout: {argument} is {tensor.dtype} on {tensor.device}, "
                    f"{'a floating-point type' if is_bias else 'int32'} on the device of "
                    "key_blocks is needed"
                )
        window, pattern = self.window, self.pattern
        if window is not None and not (isinstance(window, SlidingWindow) and window.is_contiguous):
            raise ValueError(
                f"BlockLayout: window is {window!r}, one without holes or None is needed"
            )
        if pattern is not None and not isinstance(pattern, Pattern):
            raise ValueError(f"BlockLayout: pattern is {pattern!r}, a Pattern or None is needed")

    def check_once(self) -> None:
        """Calls `validate` the first time, and never for lists that were built by this package.

        Raises:
            ValueError: as `validate`, or a block of the window is missing in a list.
        """
        if not self.is_checked:
            self._check_types()
            if self.key_blocks.is_meta:
                return
            self.validate()
            self._check_window()
            known_right(self)

    def _times_listed(self, members: torch.Tensor) -> torch.Tensor:
        """int32 [batch or 1, heads or 1, num_query_blocks, num_key_blocks]: how many used entries
        of a list, among `members` (boolean, shape of key_blocks), are of a key block.
        """
        shape = (*self.counts.shape, self.num_key_blocks)
        hits = torch.zeros(shape, dtype=torch.int32, device=self.counts.device)
        members = members & self.used
        return hits.scatter_add_(-1, self.key_blocks.long().where(members, 0), members.int())

    def _check_window(self) -> None:
        """Raises unless every list has all blocks of the window, which some backends compute whole.

        What an `AttentionSpan` hides anyway may be missing, as in the lists of `window_layout`.
        """
        if self.window is None:
            return
        whole = block_layout(
            self.window,
            self.length,
            query_block_size=self.query_block_size,
            key_block_size=self.key_block_size,
            device=self.counts.device,
        )
        is_needed = whole._times_listed(whole.used) > 0
        is_window = (self.flags & EntryFlag.WINDOW) != 0
        if bool((is_needed & (self._times_listed(is_window) == 0)).any()):
            raise ValueError(
                "BlockLayout: key_blocks lacks WINDOW entries: every list needs one for each block "
                f"that the window {self.window} touches; window=None needs none"
            )

    def select(self, keep: torch.Tensor) -> "BlockLayout":
        """The layout with only the used entries where `keep` (boolean, shape of key_blocks) is
        True, in the same order.
        """
        keep = keep & self.used
        counts = keep.sum(dim=-1, dtype=torch.int32)
        width = int(counts.max()) if counts.numel() else 0
        order = torch.argsort(keep.int(), dim=-1, descending=True, stable=True)[..., :width]
        return replace(
            self,
            key_blocks=self.key_blocks.gather(-1, order),
            flags=self.flags.gather(-1, order),
            bias=None if self.bias is None else self.bias.gather(-1, order),
            counts=counts,
        )

    def transpose(self) -> "TransposedLayout":
        """For every key block the query blocks that read it, built by one stable sort on the
        layout's device.
        """
        shape = self.key_blocks.shape
        rows = shape[0] * shape[1]
        # The padding goes to a sentinel after the last key block of all rows, behind the end of the
        # lists.
        row = torch.arange(rows, device=self.key_blocks.device).view(shape[0], shape[1], 1, 1)
        sort_key = row * self.num_key_blocks + self.key_blocks.long()
        sort_key = sort_key.where(self.used, rows * self.num_key_blocks).flatten()
        sort_key, entry = torch.sort(sort_key, stable=True)
        starts = torch.searchsorted(
            sort_key,
            torch.arange(
                rows * self.num_key_blocks + 1, device=sort_key.device, dtype=sort_key.dtype
            ),
        )
        return TransposedLayout(
            starts=starts.int(),
            query_blocks=(entry // shape[3] % shape[2]).int(),
            entries=entry,
        )


def check_block_sizes(owner: str, **sizes: object) -> None:
    """Raises ValueError unless every size is a whole number of tokens that a block may have."""
    for argument, size in sizes.items():
        if not isinstance(size, int) or not MIN_BLOCK_SIZE <= size <= MAX_BLOCK_SIZE:
            raise ValueError(
                f"{owner}: {argument} is {size!r}, {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE} is allowed"
            )


def known_right(layout: BlockLayout) -> BlockLayout:
    """The same layout, which `check_once` then takes as it is: for lists that are right by
    construction.
    """
    if not torch.compiler.is_compiling():
        object.__setattr__(layout, "is_checked", True)
    return layout


@dataclass(frozen=True)
class TransposedLayout:
    """A `BlockLayout` read by key block, in compressed rows.

    Attributes:
        starts: int32 [batch * heads * num_key_blocks + 1] (batch, heads as in the layout, 1 where
            shared); the query blocks that read key block c are `query_blocks[starts[c]:starts[c +
            1]]`, in ascending order.
        query_blocks: int32 [number of entries, padding at the end].
        entries: int64, as query_blocks: index of the entry in the flattened key_blocks, flags and
            bias.
    """

    starts: torch.Tensor
    query_blocks: torch.Tensor
    entries: torch.Tensor


def split_window(pattern: Pattern) -> tuple[SlidingWindow | None, Pattern | None]:
    """Splits a pattern into the window without holes that is computed as a band, and the rest.

    With several such windows in a union the widest stays a window; those inside it vanish. Full
    attention is a window that reaches everywhere. Global tokens are not part of the result: the
    operator moves them into the global mask.
    """
    if isinstance(pattern, SlidingWindow) and pattern.is_contiguous:
        return pattern, None
    if any(isinstance(part, Full) for part in pattern.parts):
        return SlidingWindow(LARGEST), None
    bands = [part for part in pattern.parts if isinstance(part, SlidingWindow)]
    window = None
    for band in bands:
        if band.is_contiguous and (window is None or band.width > window.width):
            window = band
    rest = []
    for part in pattern.parts:
        if isinstance(part, GlobalTokens):
            continue
        if isinstance(part, SlidingWindow) and window is not None and part.is_within(window):
            continue
        rest.append(part)
    return window, union(tuple(rest))


def block_layout(
    pattern: Pattern,
    length: int,
    *,
    query_block_size: int = 64,
    key_block_size: int = 64,
    num_heads: int = 1,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """The lists of key blocks that a fixed pattern touches; cached.

    Args:
        pattern: global tokens in it are left out (the operator packs them).
        length: tokens in the sequence.
        query_block_size, key_block_size: in tokens.
        num_heads: only matters for patterns that differ by head; the lists of all others are
            shared.
        device: where the tensors of the layout live.

    Raises:
        ValueError: an argument has a wrong type or value.

    Note:
        The cost is O(length) for a window and O(length^2) bit operations for other patterns, paid
        once.
    """
    if not isinstance(pattern, Pattern):
        raise ValueError(f"block_layout: pattern is {pattern!r}, a Pattern is needed")
    check_whole("block_layout", 0, length=length)
    check_whole("block_layout", 1, num_heads=num_heads)
    check_block_sizes(
        "block_layout", query_block_size=query_block_size, key_block_size=key_block_size
    )
    device = torch.device(device)
    layout = _cached_layout(pattern, length, query_block_size, key_block_size, num_heads, device)
    return kept_in_graphs(layout, device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _cached_layout(
    pattern: Pattern,
    length: int,
    query_block_size: int,
    key_block_size: int,
    num_heads: int,
    device: torch.device,
) -> BlockLayout:
    # Built on the CPU, whatever the caller's default device is.
    with torch.device("cpu"):
        window, rest = split_window(pattern)
        sizes = (length, query_block_size, key_block_size)
        pieces = []
        if rest is not None:
            pieces.append(
                _pattern_entries(rest, window, *sizes, num_heads if rest.varies_by_head else 1)
            )
        if window is not None:
            pieces.append(window_entries(window, *sizes))
        if not pieces:
            raise ValueError(
                f"block_layout: pattern {pattern} has only global tokens, nothing is left for the "
                "lists"
            )
        heads = max(blocks.shape[0] for blocks, _ in pieces)
        blocks = torch.cat([blocks.expand(heads, -1, -1) for blocks, _ in pieces], dim=-1)
        flags = torch.cat([flags.expand(heads, -1, -1) for _, flags in pieces], dim=-1)
        merged = BlockLayout(
            key_blocks=blocks[None],
            counts=torch.full((1, *blocks.shape[:2]), blocks.shape[2], dtype=torch.int32),
            flags=flags[None],
            query_block_size=query_block_size,
            key_block_size=key_block_size,
            length=length,
            window=window,
            pattern=rest,
        )
        merged = merged.select(merged.flags != 0)
    moved = replace(
        merged,
        key_blocks=merged.key_blocks.to(device),
        counts=merged.counts.to(device),
        flags=merged.flags.to(device),
    )
    return ready_for_every_stream(known_right(moved), device)


def window_entries(
    window: SlidingWindow,
    length: int,
    query_block_size: int,
    key_block_size: int,
    device: torch.device | str = "cpu",
    reach: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key blocks and flags [1, num_query_blocks, width] of a window; flag 0 where there is no
    entry, which is only at the end of a list.

    With `reach`, int64 [heads], [heads, num_query_blocks, width]: the blocks that hold a key of the
    window at most so many tokens from a query. What an entry lets through stays the same.
    """
    start, end, first, last = window_blocks(
        window, length, query_block_size, key_block_size, device, reach
    )
    width = most_window_entries(window, length, query_block_size, key_block_size)
    blocks = first + torch.arange(width, device=device)
    key_start = blocks * key_block_size
    key_end = (key_start + key_block_size).clamp(max=length) - 1
    assert window.right is not None
    full = (key_start >= end - window.left) & (key_end <= start + window.right)
    flags = (full * int(EntryFlag.FULL) + int(EntryFlag.WINDOW)) * (blocks <= last)
    blocks, flags = blocks.int(), flags.int()
    return (blocks[None], flags[None]) if reach is None else (blocks, flags)


def window_blocks(
    window: SlidingWindow,
    length: int,
    query_block_size: int,
    key_block_size: int,
    device: torch.device | str = "cpu",
    reach: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first and the last query of query blocks, [num_query_blocks, 1], and the first and the
    last key block that they see in a window, with a `reach` [heads, num_query_blocks, 1].
    """
    start = torch.arange(-(-length // query_block_size), device=device)[:, None] * query_block_size
    end = (start + query_block_size).clamp(max=length) - 1
    assert window.right is not None
    left, right = window.left, window.right
    if reach is not None:
        left, right = (reach.clamp(0, side)[:, None, None] for side in (left, right))
    first = (start - left).clamp(min=0) // key_block_size
    last = (end + right).clamp(max=length - 1) // key_block_size
    return start, end, first, last


def most_window_entries(
    window: SlidingWindow, length: int, query_block_size: int, key_block_size: int
) -> int:
    """How many entries of a window a list has, at most."""
    assert window.right is not None
    most = (window.left + window.right + query_block_size - 2) // key_block_size + 2
    return min(most, -(-length // key_block_size))


def window_layout(
    window: SlidingWindow,
    length: int,
    reach: torch.Tensor,
    *,
    query_block_size: int = 64,
    key_block_size: int = 64,
) -> BlockLayout:
    """The lists of key blocks of a window of which every head sees only a part.

    Args:
        window: without holes.
        length: tokens in the sequence.
        reach: int64 [heads], so many tokens to either side a head sees; on the layout's device.
            The window stays the token mask: how far a head sees inside a block says an
            `AttentionSpan`.
        query_block_size, key_block_size: in tokens.
    """
    sizes = (query_block_size, key_block_size)
    blocks, flags = window_entries(window, length, *sizes, reach.device, reach)
    used = flags != 0
    layout = BlockLayout(
        key_blocks=blocks.where(used, 0)[None],
        counts=used.sum(dim=-1, dtype=torch.int32)[None],
        flags=flags[None],
        query_block_size=query_block_size,
        key_block_size=key_block_size,
        length=length,
        window=window,
    )
    return known_right(layout)


def _pattern_entries(
    pattern: Pattern,
    window: SlidingWindow | None,
    length: int,
    query_block_size: int,
    key_block_size: int,
    heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key blocks and flags [heads, num_query_blocks, num_key_blocks] of any pattern, one row of
    tiles at a time.
    """
    num_key_blocks = -(-length // key_block_size)
    key = torch.arange(length)
    head = torch.arange(heads)[:, None, None]
    rows = []
    for start in range(0, length, query_block_size):
        query = torch.arange(start, min(start + query_block_size, length))[:, None]
        allowed = pattern.allowed(query, key, head, length)
        if window is not None:
            allowed = allowed & ~window.allowed(query, key, head, length)
        allowed = allowed.expand(heads, query.shape[0], length)
        filler = num_key_blocks * key_block_size - length
        touched = torch.nn.functional.pad(allowed, (0, filler), value=False)
        covered = torch.nn.functional.pad(allowed, (0, filler), value=True)
        touched = (
            touched.view(heads, query.shape[0], num_key_blocks, key_block_size)
            .any(dim=3)
            .any(dim=1)
        )
        covered = (
            covered.view(heads, query.shape[0], num_key_blocks, key_block_size)
            .all(dim=3)
            .all(dim=1)
        )
        rows.append(
            torch.where(covered, int(EntryFlag.FULL), 0)
            + torch.where(touched, int(EntryFlag.PATTERN), 0)
        )
    flags = torch.stack(rows, dim=1).int() if rows else torch.zeros(heads, 0, 0, dtype=torch.int32)
    flags = flags.where((flags & EntryFlag.PATTERN) != 0, 0)
    return torch.arange(num_key_blocks, dtype=torch.int32).expand_as(flags), flags
