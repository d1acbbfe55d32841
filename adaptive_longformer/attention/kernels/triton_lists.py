# type: ignore  (a kernel's types are Triton's)
"""Triton's kernels that bring the lists of a layout into the forms that its attention kernels read.

Blocks of the window leave the lists: the attention kernels compute the window as a band.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from adaptive_longformer.attention.kernels.triton_tiles import KEY_TILE, WINDOW

_WORD = tl.constexpr(32)
_CHUNK = tl.constexpr(1024)


class Lists(NamedTuple):
    """The lists of a layout, int32, contiguous.

    Attributes:
        key_blocks, flags: [rows, query blocks, width].
        counts: [rows, query blocks].
        QUERY_BLOCK, KEY_BLOCK: tokens of the blocks.
    """

    key_blocks: Any
    flags: Any
    counts: Any
    QUERY_BLOCK: Any
    KEY_BLOCK: Any


class TileLists(NamedTuple):
    """For every tile of queries the blocks that any of its query blocks reads, each once.

    Attributes:
        items: int32 [rows, tiles, room]: key block * 16 + a bit for each query block of the tile
            that reads it; 0 fills up. First the blocks all of whose keys those query blocks see.
        entries: int32 [rows, tiles, room, query blocks of a tile]: which entry of the list an item
            is, -1 where it is none; None: not needed.
        counts: int32 [rows, tiles, 2]: of the blocks all of whose keys are seen, and of all.
    """

    items: Any
    entries: Any
    counts: Any


class Readers(NamedTuple):
    """The lists transposed: for every key block the entries that read it, in ascending order.

    Attributes:
        words: int32 [rows, query blocks / 32, key blocks], a bit per query block that reads.
        offsets: int32, as words: how many readers of the key block come before.
        starts: int32 [rows, key blocks + 1], where the readers of a key block begin.
        entries: int32 [rows, query blocks * width]: query block * width + entry of its list.
        slot_starts: int32 [rows, key blocks + 1]: where the slots begin of the parts into which a
            long column is split.
        slot_columns: int32 [rows, slots]: the key block of a slot.
    """

    words: Any
    offsets: Any
    starts: Any
    entries: Any
    slot_starts: Any
    slot_columns: Any


@triton.jit
def list_room(width, KEY_BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    """Room for the items of a tile: whole tiles of keys."""
    BLOCKS: tl.constexpr = KEY_TILE // KEY_BLOCK if KEY_BLOCK < KEY_TILE else 1
    return tl.cdiv(GROUPS * width, BLOCKS) * BLOCKS


@triton.jit(do_not_specialize=["length", "width"])
def make_tile_lists(
    lists, tiles, window, length, width, GROUPS: tl.constexpr, CAUSAL: tl.constexpr,
    WIDE: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """A program makes the list of one tile of GROUPS query blocks, of at most P entries in all."""
    QUERY_BLOCK: tl.constexpr = lists.QUERY_BLOCK
    KEY_BLOCK: tl.constexpr = lists.KEY_BLOCK
    num_query_blocks, num_key_blocks = tl.cdiv(length, QUERY_BLOCK), tl.cdiv(length, KEY_BLOCK)
    num_tiles = tl.cdiv(num_query_blocks, GROUPS)
    room = list_room(width, KEY_BLOCK, GROUPS)
    row, tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    place = tl.arange(0, P)
    group = place // width
    block = tile * GROUPS + group
    list_index = row.to(tl.int64) * num_query_blocks + block
    is_entry = (group < GROUPS) & (block < num_query_blocks)
    count = tl.load(lists.counts + list_index, mask=is_entry, other=0)
    is_entry = is_entry & (place % width < count)
    pointer = list_index * width + place % width
    flags = tl.load(lists.flags + pointer, mask=is_entry, other=WINDOW)
    key_block = tl.load(lists.key_blocks + pointer, mask=is_entry, other=0)
    is_entry = is_entry & ((flags & WINDOW) == 0)

    first_query = tile * GROUPS * QUERY_BLOCK
    last_query = tl.minimum(first_query + GROUPS * QUERY_BLOCK, length) - 1
    first_key = key_block * KEY_BLOCK
    last_key = tl.minimum(first_key + KEY_BLOCK, length) - 1
    is_edge = first_key < 0
    if window is not None:
        is_near = (last_key >= first_query - window.left) & (first_key <= last_query + window.right)
        is_edge = is_edge | is_near
    if CAUSAL:
        is_entry = is_entry & (first_key <= last_query)
        is_edge = is_edge | (last_key > first_query)

    # Equal blocks become neighbours, those with hidden keys come last.
    if WIDE:
        key_block = key_block.to(tl.int64)
    last = num_key_blocks * 2
    sort_key = (
        tl.where(is_entry, key_block + is_edge.to(tl.int32) * num_key_blocks, last) * P + place
    )
    sort_key = tl.sort(sort_key)
    place, block_key = sort_key % P, sort_key // P
    is_entry = block_key < last
    position = tl.arange(0, P)
    is_first = is_entry
    if GROUPS > 1:
        before = tl.gather(block_key, tl.maximum(position - 1, 0), 0)
        is_first = is_entry & ((position == 0) | (block_key != before))
    rank = tl.cumsum(is_first.to(tl.int32), 0) - 1
    total = tl.sum(is_first.to(tl.int32), 0)
    num_plain = tl.sum((is_first & (block_key < num_key_blocks)).to(tl.int32), 0)
    program = tl.program_id(0).to(tl.int64)
    tl.store(tiles.counts + program * 2, num_plain)
    tl.store(tiles.counts + program * 2 + 1, total)

    items = tiles.items + program * room
    item = ((block_key % num_key_blocks) * 16).to(tl.int32)
    group, entry = (place // width).to(tl.int32), (place % width).to(tl.int32)
    tl.store(items + position, 0, mask=position < room)
    if tiles.entries is not None:
        entries = tiles.entries + program * room * GROUPS
        no_entry = tl.full([P], -1, tl.int32)
        for g in tl.static_range(GROUPS):
            tl.store(entries + position * GROUPS + g, no_entry, mask=position < room)
    tl.debug_barrier()
    # Every bit is added once.
    bits = (1 << group) + tl.where(is_first, item, 0)
    tl.atomic_add(items + rank, bits, mask=is_entry, sem="relaxed")
    if tiles.entries is not None:
        tl.store(entries + rank * GROUPS + group, entry, mask=is_entry)


@triton.jit
def _listed(lists, num_query_blocks, width, row, index, end):
    """Of entries query block * width + entry: the key block, the query block, and whether the entry
    is used and not of the window.
    """
    is_used = index < end
    block = index // width
    list_index = row * num_query_blocks + block
    count = tl.load(lists.counts + list_index, mask=is_used, other=0)
    is_used = is_used & (index % width < count)
    pointer = row * num_query_blocks * width + index
    flags = tl.load(lists.flags + pointer, mask=is_used, other=WINDOW)
    key_block = tl.load(lists.key_blocks + pointer, mask=is_used, other=0)
    return key_block, block, is_used & ((flags & WINDOW) == 0)


@triton.jit
def _count_bits(word):
    """Of int32."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["length", "width"])
def mark_readers(lists, readers, length, width):
    """A program marks, for 32 query blocks, which key blocks they read."""
    num_query_blocks = tl.cdiv(length, lists.QUERY_BLOCK)
    num_key_blocks = tl.cdiv(length, lists.KEY_BLOCK)
    num_chunks = tl.cdiv(num_query_blocks, _WORD)
    row, chunk = (tl.program_id(0) // num_chunks).to(tl.int64), tl.program_id(0) % num_chunks
    words = readers.words + (row * num_chunks + chunk) * num_key_blocks
    lane = tl.arange(0, _CHUNK)
    for start in range(0, num_key_blocks, _CHUNK):
        tl.store(words + start + lane, 0, mask=start + lane < num_key_blocks)
    tl.debug_barrier()
    first = chunk * _WORD * width
    end = tl.minimum(chunk * _WORD + _WORD, num_query_blocks) * width
    for start in range(first, end, _CHUNK):
        key_block, block, is_entry = _listed(lists, num_query_blocks, width, row, start + lane, end)
        one = tl.full([_CHUNK], 1, tl.int32)
        tl.atomic_or(words + key_block, one << (block % _WORD), mask=is_entry, sem="relaxed")


@triton.jit(do_not_specialize=["num_query_blocks", "num_key_blocks", "max_slots"])
def number_readers(
    readers, num_query_blocks, num_key_blocks, max_slots, UNSPLIT: tl.constexpr,
    PART: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program numbers the readers of one row of lists, and the parts of long columns.

    Args:
        max_slots: room of slot_columns.
        UNSPLIT: so many readers of a key block are not in parts.
        PART: readers of a part.
        COLUMNS: key blocks that are looked at together.
    """
    row = tl.program_id(0).to(tl.int64)
    num_chunks = tl.cdiv(num_query_blocks, _WORD)
    first_word = row * num_chunks * num_key_blocks
    starts = readers.starts + row * (num_key_blocks + 1)
    slot_starts = readers.slot_starts + row * (num_key_blocks + 1)
    num_readers, num_slots = 0, 0
    for start in range(0, num_key_blocks, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        is_column = column < num_key_blocks
        total = tl.zeros([COLUMNS], tl.int32)
        for chunk in range(num_chunks):
            pointer = first_word + chunk * num_key_blocks + column
            word = tl.load(readers.words + pointer, mask=is_column, other=0)
            tl.store(readers.offsets + pointer, total, mask=is_column)
            total += _count_bits(word)
        tl.store(starts + column, num_readers + tl.cumsum(total, 0) - total, mask=is_column)
        parts = tl.cdiv(tl.maximum(total - UNSPLIT, 0), PART)
        slot = num_slots + tl.cumsum(parts, 0) - parts
        tl.store(slot_starts + column, slot, mask=is_column)
        for part in range(tl.max(parts, 0)):
            pointer = readers.slot_columns + row * max_slots + slot + part
            tl.store(pointer, column, mask=part < parts)
        num_readers += tl.sum(total, 0)
        num_slots += tl.sum(parts, 0)
    tl.store(starts + num_key_blocks, num_readers)
    tl.store(slot_starts + num_key_blocks, num_slots)


@triton.jit(do_not_specialize=["length", "width"])
def write_readers(lists, readers, length, width):
    """A program writes the entries of 32 query blocks to their places among the readers."""
    num_query_blocks = tl.cdiv(length, lists.QUERY_BLOCK)
    num_key_blocks = tl.cdiv(length, lists.KEY_BLOCK)
    num_chunks = tl.cdiv(num_query_blocks, _WORD)
    row, chunk = (tl.program_id(0) // num_chunks).to(tl.int64), tl.program_id(0) % num_chunks
    first_word = (row * num_chunks + chunk) * num_key_blocks
    lane = tl.arange(0, _CHUNK)
    first = chunk * _WORD * width
    end = tl.minimum(chunk * _WORD + _WORD, num_query_blocks) * width
    for start in range(first, end, _CHUNK):
        key_block, block, is_entry = _listed(lists, num_query_blocks, width, row, start + lane, end)
        word = tl.load(readers.words + first_word + key_block, mask=is_entry, other=0)
        one = tl.full([_CHUNK], 1, tl.int32)
        rank = _count_bits(word & ((one << (block % _WORD)) - 1))
        rank += tl.load(readers.offsets + first_word + key_block, mask=is_entry, other=0)
        pointer = row * (num_key_blocks + 1) + key_block
        rank += tl.load(readers.starts + pointer, mask=is_entry, other=0)
        entries = readers.entries + row * num_query_blocks * width
        tl.store(entries + rank, start + lane, mask=is_entry)
