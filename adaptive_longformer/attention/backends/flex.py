"""The backend "flex": the lists of a call as the BlockMask of torch's FlexAttention.

On a GPU it is compiled by torch, and stands in where our own kernels cannot be built. On a CPU it
is torch's unfused computation, O(length^2), for comparison.

A BlockMask lists tiles of 128 x 128 tokens: the smallest for which torch 2.13 has a backward kernel
on every GPU. A tile is listed if one of its blocks is; which pairs of it are visible, and with
which bias, is looked up by block, so that the result does not depend on the tiles.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from adaptive_longformer.attention.backends.compiled import why_not_whole_blocks
from adaptive_longformer.attention.backends.self_test import why_wrong
from adaptive_longformer.attention.call import AttentionCall
from adaptive_longformer.attention.kernels.load import until_forgotten
from adaptive_longformer.attention.operator import merge_global_rows
from adaptive_longformer.attention.padding import ordinary_tokens, readable
from adaptive_longformer.patterns.block_layout import BlockLayout, EntryFlag

TILE = 128
# What a pair needs of its block: an entry for the inside of the window, or one for the outside.
_INSIDE, _OUTSIDE = 1, 2
# Farther than any offset, and far from overflow.
_NOWHERE = 2**30
# Of blocks, in the tables that say what is visible; 16 M are 64 MiB per table.
_MOST_PAIRS = 2**24
# Types, sizes and gradients that change make torch compile again.
_RECOMPILE_LIMIT = 64


def flex_supports(call: AttentionCall) -> str | None:
    """None, or why FlexAttention cannot run the call. Compiles and checks it if need be."""
    query = call.query
    if query.device.type not in ("cpu", "cuda"):
        return f"tensors are on {query.device}, FlexAttention is used on CPUs and CUDA devices"
    if query.numel() == 0:
        return "there is nothing to compute"
    if torch.compiler.is_compiling():
        return "it is compiled on its own, not as a part of another graph"
    if call.dropout_p > 0:
        return "FlexAttention has no dropout of attention weights (dropout_p > 0)"
    if call.span is not None:
        return "it has no adaptive span"
    query_block, key_block = call.block_sizes
    if TILE % query_block != 0 or TILE % key_block != 0:
        return f"blocks of {query_block} x {key_block} tokens do not divide tiles of {TILE}"
    # One number for every pair of blocks: O(length^2), if with a small factor.
    num_pairs = query.shape[2] // query_block * (call.key.shape[2] // key_block)
    if query.shape[0] * query.shape[1] * num_pairs > _MOST_PAIRS:
        return f"its tables would hold more than {_MOST_PAIRS} pairs of blocks"
    wants_gradient = torch.is_grad_enabled()
    if wants_gradient and call.entry_bias is not None and call.entry_bias.requires_grad:
        return "it adds the gradient of an entry bias up in no fixed order"
    if query.device.type == "cpu":
        if wants_gradient and any(tensor.requires_grad for tensor in (query, call.key, call.value)):
            return "FlexAttention has no backward pass on a CPU"
        return why_not_whole_blocks(call)
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{query.dtype} is not one of float32, bfloat16 and float16"
    if query.shape[3] < 16:
        return f"head_dim {query.shape[3]}, FlexAttention needs 16 or more"
    return why_not_whole_blocks(call) or _check_on_device(
        query.device.index or 0, query.dtype, query.shape[3]
    )


def run_flex(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [batch, heads, length, head_dim] and log-sum-exp [batch, heads, length] of a call."""
    query, key, value = readable(call.query, call.key, call.value, call.attention_mask)
    slots = _Slots(call)
    key, value = slots.gather(key), slots.gather(value)
    is_fused = query.device.type == "cuda"
    if not is_fused and not torch.is_grad_enabled():
        # On a CPU torch refuses what could have a gradient, even where none is wanted.
        query, key, value = query.detach(), key.detach(), value.detach()
    attend = _compiled("inductor" if is_fused else "eager")
    modify, mask = slots.score_modification(), slots.block_mask()
    with torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT):
        output, auxiliary = attend(
            query, key, value, score_mod=modify, block_mask=mask, scale=call.scale,
            return_aux=AuxRequest(lse=True),
        )  # fmt: skip
    lse = auxiliary.lse
    if call.global_mask is None:
        return output, lse
    return merge_global_rows(output, lse, call)


class _Slots:
    """The keys as FlexAttention sees them: the blocks of the sequence, then the packed global keys.

    A global key is closed where it stands in the sequence, so that it counts once.

    Attributes:
        positions: int64 [batch or 1, slots], the token of a slot.
        is_open: bool, the same shape: whether a slot holds a key for anyone.
        kinds: int32 [batch, heads, query_blocks, blocks of slots], which entries there are.
        bias: float, shape of kinds, or None.
    """

    def __init__(self, call: AttentionCall) -> None:
        self.layout = layout = call.lists()
        self.is_causal = call.is_causal
        self.batch, self.heads, self.length, _ = call.query.shape
        device, size = call.query.device, layout.key_block_size
        slots = layout.num_key_blocks * size
        positions = torch.arange(slots, device=device)[None]
        is_open = positions < self.length
        listed = ordinary_tokens(call.attention_mask, call.global_mask)
        if listed is not None:
            filled = torch.nn.functional.pad(listed, (0, slots - self.length), value=False)
            is_open = is_open & filled
        num_packs = 0
        if call.global_keys is not None:
            packed = call.global_keys.packed()  # [batch, G]
            num_packs = -(-packed.shape[1] // size)
            filler = num_packs * size - packed.shape[1]
            packed = torch.nn.functional.pad(packed, (0, filler), value=self.length)
            is_open = torch.cat([is_open, packed < self.length], dim=1)
            positions = torch.cat([positions.expand(self.batch, -1), packed], dim=1)
        self.positions = positions.clamp(max=self.length - 1)
        self.is_open, self.num_packs = is_open, num_packs
        self.kinds, self.is_full = self._tables(layout)
        self.bias = None
        if call.entry_bias is not None:
            self.bias = self._bias_table(layout, call.entry_bias)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keys or values [batch, heads, slots, head_dim] of [batch, heads, length, head_dim]."""
        slots = self.is_open.shape[1]
        if self.num_packs == 0:
            return torch.nn.functional.pad(tensor, (0, 0, 0, slots - self.length))
        index = self.positions[:, None, :, None]
        return tensor.gather(2, index.expand(*tensor.shape[:2], slots, tensor.shape[3]))

    def _tables(self, layout: BlockLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """Which entries every block has, and whether one of them covers it: [batch or 1, heads or
        1, query_blocks, blocks].
        """
        flags = layout.flags.expand(layout.key_blocks.shape)
        is_window = (flags & EntryFlag.WINDOW) != 0
        is_full = ((flags & EntryFlag.FULL) != 0) & layout.used
        kind = torch.where(is_window, _INSIDE, _OUTSIDE).where(layout.used, 0)
        index = layout.key_blocks.long().where(layout.used, 0)
        shape = (*layout.counts.shape, layout.num_key_blocks)
        kinds = torch.zeros(shape, dtype=torch.int32, device=index.device)
        # A block has at most one entry of a kind.
        kinds.scatter_add_(-1, index, kind.int())
        full = torch.zeros_like(kinds).scatter_add_(-1, index, is_full.int()) > 0
        packs = (0, self.num_packs)
        return (
            torch.nn.functional.pad(kinds, packs, value=_INSIDE | _OUTSIDE),
            torch.nn.functional.pad(full, packs, value=True),
        )

    def _bias_table(self, layout: BlockLayout, entry_bias: torch.Tensor) -> torch.Tensor:
        """What is added outside of the window, by block: shape of kinds, but for the batch and
        heads.
        """
        shape = torch.broadcast_shapes(layout.key_blocks.shape, entry_bias.shape)
        counts = ((layout.flags & EntryFlag.WINDOW) == 0) & layout.used
        index = layout.key_blocks.long().where(layout.used, 0).expand(shape)
        summand = entry_bias.masked_fill(~counts, 0.0).expand(shape)
        dtype = torch.promote_types(entry_bias.dtype, torch.float32)
        table = torch.zeros(
            (*shape[:3], layout.num_key_blocks), dtype=dtype, device=entry_bias.device
        )
        table = table.scatter_add(-1, index, summand.to(dtype))
        table = torch.nn.functional.pad(table, (0, self.num_packs))
        return table.expand(self.batch, self.heads, -1, -1)

    def _in_window(self) -> Callable:
        """Whether the offset of a pair is one of the window's."""
        window = self.layout.window
        left, right = -1, -1  # no offset
        if window is not None:
            assert window.right is not None
            left, right = min(window.left, _NOWHERE), min(window.right, _NOWHERE)

        def in_window(offset):
            return (offset >= -left) & (offset <= right)

        return in_window

    def block_mask(self) -> BlockMask:
        """The tiles that have visible pairs, and which pairs those are."""
        query_block, key_block = self.layout.query_block_size, self.layout.key_block_size
        in_window, positions, is_open = self._in_window(), self.positions, self.is_open
        positions = positions.expand(self.batch, -1)
        is_open = is_open.expand(self.batch, -1)
        kinds = self.kinds.expand(self.batch, self.heads, -1, -1)
        limit = 0 if self.is_causal else _NOWHERE

        def is_visible(batch, head, query, slot):
            offset = positions[batch, slot] - query
            needed = torch.where(in_window(offset), _INSIDE, _OUTSIDE)
            kind = kinds[batch, head, query // query_block, slot // key_block]
            return ((kind & needed) != 0) & is_open[batch, slot] & (offset <= limit)

        is_listed, is_full = self._tiles()
        return BlockMask.from_kv_blocks(
            *_as_lists(is_listed & ~is_full), *_as_lists(is_full), BLOCK_SIZE=(TILE, TILE),
            mask_mod=is_visible, seq_lengths=(self.length, self.is_open.shape[1]),
        )  # fmt: skip

    def _tiles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether a tile has an open block, and whether all of its pairs are visible: bool [batch
        or 1, heads or 1, rows of tiles, columns of tiles].
        """
        layout = self.layout
        open_keys = self.is_open.view(self.is_open.shape[0], 1, 1, -1, layout.key_block_size)
        is_listed = (self.kinds != 0) & open_keys.any(dim=-1)
        is_full = self.is_full & open_keys.all(dim=-1)
        if self.is_causal:
            last = self.positions.expand(self.is_open.shape[0], -1).masked_fill(~self.is_open, 0)
            last = last.view(-1, 1, 1, is_full.shape[-1], layout.key_block_size).amax(dim=-1)
            first = self.positions.view(self.positions.shape[0], 1, 1, -1, layout.key_block_size)
            rows = torch.arange(layout.num_query_blocks, device=last.device)[:, None]
            first_query = rows * layout.query_block_size
            is_full = is_full & (last <= first_query)
            is_listed = is_listed & (
                first.amin(dim=-1) <= first_query + layout.query_block_size - 1
            )
        sizes = (TILE // layout.query_block_size, TILE // layout.key_block_size)
        return (
            _by_tile(is_listed, *sizes).any(dim=-1).any(dim=-2),
            _by_tile(is_full, *sizes).all(dim=-1).all(dim=-2),
        )

    def score_modification(self) -> Callable | None:
        """Adds the bias of the entries outside of the window; None if there is no bias."""
        bias = self.bias
        if bias is None:
            return None
        query_block, key_block = self.layout.query_block_size, self.layout.key_block_size
        in_window, positions = self._in_window(), self.positions.expand(self.batch, -1)

        def add_bias(score, batch, head, query, slot):
            added = bias[batch, head, query // query_block, slot // key_block]
            offset = positions[batch, slot] - query
            return score + torch.where(in_window(offset), 0.0, added)

        return add_bias


def _by_tile(blocks: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[..., query_blocks, blocks] -> [..., rows of tiles, rows, columns of tiles, columns]; False
    beyond the end.
    """
    missing = (-blocks.shape[-1] % columns, -blocks.shape[-2] % rows)
    padded = torch.nn.functional.pad(blocks, (0, missing[0], 0, missing[1]), value=False)
    return padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))


def _as_lists(is_listed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and ids, of full width: shorter ones are read wrongly by torch 2.13."""
    order = torch.argsort(is_listed.int(), dim=-1, descending=True, stable=True)
    return is_listed.sum(dim=-1, dtype=torch.int32), order.int()


@lru_cache
def _compiled(backend: str) -> Callable:
    # Without fullgraph torch would go over to the unfused computation when the limit is reached.
    return torch.compile(flex_attention, backend=backend, fullgraph=True)


@until_forgotten
def _check_on_device(device: int, dtype: torch.dtype, head_dim: int) -> str | None:
    """None if this device gets a small problem right, else the reason."""
    return why_wrong("flex", run_flex, torch.device("cuda", device), dtype, head_dim, 64)
