"""The CUDA kernels with blocks of 16 and 32 tokens, run thread by thread on the CPU.

Triton makes their lists, so that they run where Triton interprets, in a process of its own.
"""

import ctypes
from dataclasses import replace

import pytest
import torch
from calls import pairwise, readable
from test_emulated_cuda import SEED, TOLERANCE, build_mutant, errors, masks, random_layout
from triton_on_cpu import needs_triton, skip_without_loops

from adaptive_longformer.attention.backends import cuda, triton
from adaptive_longformer.attention.call import make_call
from adaptive_longformer.attention.kernels.cuda_launches import ELEMENT_TYPES, HEAD_DIMS
from adaptive_longformer.patterns import EntryFlag, SlidingWindow
from adaptive_longformer.testing import use_library

pytestmark = needs_triton
OPTIONS = {
    "blocks": [(16, 16), (64, 32), (128, 16), (32, 32)],
    "head_dim": HEAD_DIMS,
    "dtype": [*ELEMENT_TYPES],
    "length": [70, 136],
    "is_causal": [False, True],
    "dropout_p": [0.0, 0.2],
    "with_bias": [False, True],
    "has_span": [False, True],
    "has_masks": [False, True],
    "has_window": [True, False],
    "part_tiles": [1, 64],
}


@pytest.fixture(scope="module")
def interpreted(emulator_library, triton_interpreter):
    """Calls a function of this file, with the emulator, where Triton interprets."""
    skip_without_loops()
    return lambda function, *arguments, library=emulator_library, **options: triton_interpreter(
        "test_emulated_small_blocks", "emulate", library._name, function.__name__,
        *arguments, **options,
    )  # fmt: skip


def emulate(library, name, *arguments, part_tiles=1, **options):
    """Calls a function with columns of the transposed lists in parts of so many tiles."""
    with pytest.MonkeyPatch.context() as patch, use_library("cuda", ctypes.CDLL(library)):
        patch.setattr(triton, "_PART_TILES", part_tiles)
        return globals()[name](*arguments, **options)


def layout_of(length, blocks, **options):
    query_block, key_block = blocks
    return random_layout(length, query_block, key_block=key_block, **options)


def without_window(layout):
    return replace(layout.select((layout.flags & EntryFlag.WINDOW) == 0), window=None)


@pytest.mark.parametrize("options", pairwise(OPTIONS), ids=readable)
def test_features_match_reference(options, interpreted):
    options = dict(options)
    length = options.pop("length")
    layout = layout_of(length, options.pop("blocks"))
    if not options.pop("has_window"):
        layout = without_window(layout)
    if options.pop("has_span") and layout.window is not None:
        options["span"] = 30.0
    if options.pop("has_masks"):
        options.update(masks(length))
    if options["dropout_p"]:
        options["dropout_seed"] = SEED
    results = interpreted(errors, layout, length, **options)
    assert all(error <= TOLERANCE[options["dtype"]] for error in results), results


def split_errors(*arguments, **options):
    """`errors` with the readers of packed keys in parts of two tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_ITEM_ENTRIES", 2)
        return errors(*arguments, **options)


def test_lists_that_differ_between_batch_rows_and_heads_match_reference(interpreted):
    """Global tokens fill two blocks in one row, and are read by two parts of the queries."""
    length = 140
    position, row = torch.arange(length), torch.arange(2)[:, None]
    attention_mask = (position >= 7 * row) & (position < length - 30 * (1 - row))
    is_global = torch.where(row == 0, position % 31 == 3, position % 2 == 0) & attention_mask
    results = interpreted(
        split_errors, layout_of(length, (16, 16), heads=2, batch=2), length, heads=2, batch=2,
        with_bias=True, span=60.0, is_causal=True, dropout_p=0.2, dropout_seed=SEED,
        attention_mask=attention_mask, global_mask=is_global,
    )  # fmt: skip
    assert all(error <= TOLERANCE[torch.bfloat16] for error in results), results


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64])
def test_lengths_and_shared_lists_match_reference(length, interpreted):
    layout = layout_of(length, (16, 16))
    results = interpreted(errors, layout, length, heads=2, batch=2, with_bias=True)
    assert all(error <= TOLERANCE[torch.bfloat16] for error in results), results


def test_more_steps_than_shared_memory_holds_match_reference(interpreted):
    """The first tile reads 68 pieces, and the first column is read by 68."""
    length = 17 * 64 - 5
    routed = torch.zeros(1, 1, 9, 68, dtype=torch.bool)
    routed[..., 0] = True
    layout = random_layout(
        length, 128, key_block=16, routed=routed, window=SlidingWindow(0, length)
    )
    results = interpreted(errors, layout, length, part_tiles=64)
    assert all(error <= TOLERANCE[torch.bfloat16] for error in results), results


def lists_of_nothing(layout):
    layout = replace(without_window(layout), counts=torch.zeros_like(layout.counts))
    for lists in (layout, layout.select(layout.used)):
        tensors = [torch.randn(1, 1, layout.length, 32).bfloat16() for _ in range(3)]
        bias = torch.zeros(lists.key_blocks.shape)
        output, lse = cuda.forward(make_call(*tensors, lists, entry_bias=bias))
        grads = cuda.backward(output, lse, output, lse, make_call(*tensors, lists, entry_bias=bias))
        assert output.eq(0).all() and lse.eq(-torch.inf).all()
        assert grads[3].shape == bias.shape and all(grad.eq(0).all() for grad in grads[:4])


def test_lists_of_nothing_give_zeros(interpreted):
    interpreted(lists_of_nothing, layout_of(70, (16, 16)))


def garbage_and_any_order(layout, library):
    """Bits of a call, whatever padding holds and in whatever order warps run."""
    mask = torch.ones(1, layout.length, dtype=torch.bool)
    mask[:, 20:37] = mask[:, -5:] = False
    generator = torch.Generator().manual_seed(0)
    shape = (1, 1, layout.length, 32)
    tensors = [torch.randn(shape, generator=generator).bfloat16() for _ in range(4)]
    padding, results = ~mask[:, None, :, None], []
    for seed, fill in ((1, 0.0), (2, torch.nan), (3, torch.inf)):
        ctypes.CDLL(library).adaptive_emulator_seed(seed)
        call = make_call(
            *(tensor.masked_fill(padding, fill) for tensor in tensors[:3]), layout,
            attention_mask=mask,
        )  # fmt: skip
        output, lse = cuda.forward(call)
        grad = tensors[3].masked_fill(padding, 0.0)
        grads = cuda.backward(grad, torch.zeros_like(lse), output, lse, call)
        results.append([result[:, :, mask[0]] for result in (output, lse, *grads[:3])])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_padding_and_the_order_of_warps_change_no_bit(interpreted, emulator_library):
    interpreted(garbage_and_any_order, layout_of(100, (16, 16)), emulator_library._name)


# As in test_emulated_cuda.py: (file, text, replacement).
_AFTER_USE = "query_tile, grad_tile, lane);\n    }\n    synchronize_block();"
MUTANTS = {
    "pieces_without_their_query_blocks": (
        "forward.cuh", "WIDTH == KEY_BLOCK || step.is_of_group(pieces.group(warp))", "true",
    ),
    "small_keys_without_barrier_after_use": (
        "backward.cuh", f"keys, step, first_query, 0, 0,\n{' ' * 36}rows, {_AFTER_USE}",
        f"keys, step, first_query, 0, 0, rows, {_AFTER_USE}".replace("synchronize_block();", ""),
    ),
    "small_keys_of_one_slot": (
        "backward.cuh", "slot < column.end_slot; slot++", "slot < column.first_slot + 1; slot++",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", ["none", *MUTANTS])
def test_emulator_catches(mutant, tmp_path, interpreted):
    """Every key block is read by some query blocks of a tile, or by all seven, in two slots of six
    and of one.
    """
    library = build_mutant(tmp_path, MUTANTS.get(mutant), "<TYPE, D, 64, PIECE>")
    results = []
    for share in (0.5, 1.0):
        layout = random_layout(200, 32, key_block=32, share=share, window=SlidingWindow(9))
        results += interpreted(errors, layout, 200, with_bias=True, library=library, part_tiles=3)
    is_correct = all(error <= TOLERANCE[torch.bfloat16] for error in results)
    assert is_correct == (mutant == "none"), results
