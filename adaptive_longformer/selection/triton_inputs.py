# type: ignore  (a kernel's types are Triton's)
"""What a choice of blocks reads besides queries and keys, in a kernel each: masks in the form of
`ExactCall`, and means of keys.
"""

import torch
import triton
import triton.language as tl

_TOKENS = tl.constexpr(1024)
_KEYS = 64


def triton_masks(
    attention_mask: torch.Tensor | None,
    global_mask: torch.Tensor | None,
    max_global_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The tokens that are neither padding nor global, bool [batch, length]; and `ends` and
    `global_positions` of an `ExactCall`, None without the mask that they are of.

    Args:
        attention_mask, global_mask: as in `select_blocks`, one of them at least.
        max_global_tokens: so many columns there are of positions.
    """
    some = attention_mask if global_mask is None else global_mask
    batch, length = some.shape
    width = 0 if global_mask is None else min(max_global_tokens, length)
    members = some.new_empty(batch, length)
    ends = positions = None
    if attention_mask is not None:
        attention_mask = attention_mask.contiguous()
        ends = some.new_empty(batch, dtype=torch.int64)
    if global_mask is not None:
        global_mask = global_mask.contiguous()
        positions = some.new_empty(batch, width, dtype=torch.int64)
    if batch:
        with torch.cuda.device_of(some):
            _masks_kernel[batch,](
                attention_mask, global_mask, members, ends, positions, length, width
            )
    return members, ends, positions


@triton.jit(do_not_specialize=["length", "width"])
def _masks_kernel(attention_mask, global_mask, members, ends, positions, length, width):
    """A row of a batch."""
    row = tl.program_id(0).to(tl.int64)
    end, num_global = 0, 0
    for first in range(0, length, _TOKENS):
        token = first + tl.arange(0, _TOKENS)
        is_there = token < length
        is_member = is_there
        if attention_mask is not None:
            mask = tl.load(attention_mask + row * length + token, mask=is_there, other=0)
            is_member = is_there & (mask != 0)
            end = tl.maximum(end, tl.max(tl.where(is_member, token + 1, 0), axis=0))
        if global_mask is not None:
            mask = tl.load(global_mask + row * length + token, mask=is_there, other=0)
            is_global = is_member & (mask != 0)
            column = num_global + tl.cumsum(is_global.to(tl.int32), axis=0) - 1
            num_global += tl.sum(is_global.to(tl.int32), axis=0)
            is_global = is_global & (column < width)
            tl.store(positions + row * width + column, token.to(tl.int64), mask=is_global)
            is_member = is_member & (~is_global)
        tl.store(members + row * length + token, is_member, mask=is_there)
    if ends is not None:
        tl.store(ends + row, end)
    if positions is not None:
        for first in range(0, width, _TOKENS):
            column = first + tl.arange(0, _TOKENS)
            is_empty = (column >= num_global) & (column < width)
            tl.store(positions + row * width + column, length, mask=is_empty)


def triton_means(
    key: torch.Tensor, counts: torch.Tensor | None, run: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`run_means`, whose means are rounded to the type of the keys.

    Args:
        key: [batch, heads, rows, head_dim].
        counts: [batch, rows]; None: 1.
        run: rows per mean, a power of 2 up to 64.
    """
    key = key if key.stride(-1) == 1 else key.contiguous()
    counts = counts if counts is None or counts.stride(-1) == 1 else counts.contiguous()
    batch, heads, rows, head_dim = key.shape
    runs = -(-rows // run)
    means = key.new_empty(batch, heads, runs, head_dim)
    sums = key.new_empty(batch, runs, dtype=torch.float32)
    programs = batch * heads * -(-rows // _KEYS)
    if programs:
        dims = triton.next_power_of_2(head_dim)
        stride = 0 if counts is None else counts.stride(0)
        with torch.cuda.device_of(key):
            _means_kernel[programs,](
                key, key.stride()[:3], counts, stride, means, sums, (heads, rows, runs),
                run, head_dim, dims, _KEYS,
            )  # fmt: skip
    return means, sums


@triton.jit(do_not_specialize=["sizes"])
def _means_kernel(
    key, strides, counts, stride, means, sums, sizes,
    run: tl.constexpr, head_dim: tl.constexpr, dims: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    heads, rows, runs = sizes
    tiles = tl.cdiv(rows, keys)
    pair, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    batch, head = pair // heads, pair % heads
    row, dim = tile * keys + tl.arange(0, keys), tl.arange(0, dims)
    count = (row < rows).to(tl.float32)
    if counts is not None:
        loaded = tl.load(counts + batch * stride + row, mask=row < rows, other=0)
        count = loaded.to(tl.float32)
    tensor = tl.load(
        key + batch * strides[0] + head * strides[1]
        + row.to(tl.int64)[:, None] * strides[2] + dim[None, :],
        mask=(count != 0)[:, None] & (dim < head_dim)[None, :],
        other=0.0,
    )  # fmt: skip
    weighted = tensor.to(tl.float32) * count[:, None]
    total = tl.sum(weighted.reshape((keys // run, run, dims)), axis=1)
    count = tl.sum(count.reshape((keys // run, run)), axis=1)
    place = tile * (keys // run) + tl.arange(0, keys // run)
    mean = (total / tl.maximum(count, 1.0)[:, None]).to(means.dtype.element_ty)
    tl.store(
        means + (pair * runs + place)[:, None] * head_dim + dim[None, :],
        mean,
        mask=(place < runs)[:, None] & (dim < head_dim)[None, :],
    )
    if head == 0:
        tl.store(sums + batch * runs + place, count, mask=place < runs)
