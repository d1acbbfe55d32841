"""FlexAttention computes the calls that it says it can, on a CPU without gradients."""

from dataclasses import replace

import pytest
import torch
from calls import random_call, routed_layout

from adaptive_longformer.attention import explain_backends, sparse_attention
from adaptive_longformer.attention.backends import choose as backends
from adaptive_longformer.attention.backends import flex
from adaptive_longformer.attention.call import make_call
from adaptive_longformer.patterns import (
    Full,
    RandomBlocks,
    SlidingWindow,
    Strided,
    block_layout,
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """What is compiled for one test does not count against the limit of the next."""
    yield
    torch.compiler.reset()


def assert_equals_reference(pattern, **options):
    tensors, options, _ = random_call(pattern, head_dim=8, **options)
    with torch.no_grad():
        actual, expected = (
            sparse_attention(*tensors, pattern, return_lse=True, backend=backend, **options)
            for backend in ("flex", "reference")
        )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("pattern", "length"),
    [(SlidingWindow(5), 1), (SlidingWindow(70, 3), 127), (Full(), 129), (SlidingWindow(0), 256)],
    ids=str,
)
def test_windows_match_reference(pattern, length):
    assert_equals_reference(pattern, length=length)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "left", "global_tokens": "few", "global_qkv": "absorbed"},
        {"padding": "all", "global_tokens": "many", "is_causal": True},
        {"padding": "right", "is_causal": True},
        {"global_tokens": "none", "global_qkv": "explicit"},
    ],
    ids=str,
)
@pytest.mark.parametrize("blocks", [(64, 64), (16, 32)], ids=str)
def test_lists_with_bias_match_reference(blocks, options):
    assert_equals_reference(routed_layout(300, *blocks), length=300, **options)


def test_lists_that_differ_by_batch_and_head_match_reference():
    layout = routed_layout(200, 64, 64, batch=2, heads=2)
    assert_equals_reference(layout, length=200, global_tokens="few")


def test_random_blocks_match_reference():
    pattern = SlidingWindow(4) | RandomBlocks(2, 64)
    assert_equals_reference(pattern, length=300, padding="left")


@pytest.mark.parametrize("is_causal", [False, True])
def test_tiles_are_those_of_visible_pairs(is_causal):
    """The unfused computation looks at the pairs alone; lists of tiles are for the fused one."""
    layout = routed_layout(900, 64, 64, window=SlidingWindow(300, 300))
    mask = torch.ones(1, 900, dtype=torch.bool)
    mask[:, 600:] = False
    query = torch.zeros(1, 1, 900, 8)
    call = make_call(
        query, query, query, layout, attention_mask=mask, is_causal=is_causal,
        global_mask=torch.arange(900)[None] == 400,
    )  # fmt: skip
    block_mask = flex._Slots(call).block_mask()
    assert block_mask.full_kv_num_blocks is not None
    batch, head = torch.zeros(2, dtype=torch.int64)
    rows, columns = (torch.arange(size) for size in block_mask.seq_lengths)
    visible = block_mask.mask_mod(batch, head, rows[:, None], columns)
    tiles = [-(-size // flex.TILE) for size in block_mask.seq_lengths]
    seen = []
    for ids, counts in (
        (block_mask.kv_indices, block_mask.kv_num_blocks),
        (block_mask.full_kv_indices, block_mask.full_kv_num_blocks),
    ):
        assert ids.shape[-2:] == tuple(tiles), "torch 2.13 reads narrower lists wrongly"
        seen.append([set(row[:n].tolist()) for row, n in zip(ids[0, 0], counts[0, 0])])
    for row in range(tiles[0]):
        assert not seen[0][row] & seen[1][row]
        for column in range(tiles[1]):
            tile = visible[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128]
            assert not tile.any() or column in seen[0][row] | seen[1][row]
            assert column not in seen[1][row] or tile.all()
    num_full, num_listed = (sum(map(len, part)) for part in (seen[1], seen[0]))
    assert num_full > 0 and num_full + num_listed < tiles[0] * tiles[1]


@pytest.mark.slow
def test_the_fused_computation_matches_reference(monkeypatch):
    """torch's C++ kernel reads the lists of tiles, as the one for GPUs does."""
    layout = routed_layout(700)
    tensors, options, _ = random_call(layout, length=700, head_dim=16, padding="left")
    tensors = [tensor.detach().float() for tensor in tensors]
    layout = replace(layout, bias=layout.bias.float())
    call = make_call(*tensors, layout, **options)
    slots = flex._Slots(call)
    output = torch.compile(flex.flex_attention, fullgraph=True)(
        tensors[0], slots.gather(tensors[1]), slots.gather(tensors[2]),
        score_mod=slots.score_modification(), block_mask=slots.block_mask(), scale=call.scale,
    )  # fmt: skip
    expected = sparse_attention(*tensors, layout, backend="reference", **options)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_what_it_cannot_do_has_a_reason():
    query = torch.randn(1, 2, 300, 16)
    leaf = query.clone().requires_grad_()
    seed = torch.tensor(1)
    layout = block_layout(SlidingWindow(9), 300, query_block_size=40, key_block_size=64)
    routed = routed_layout()
    bias = torch.zeros(1, 1, *routed.key_blocks.shape[2:], requires_grad=True)
    for tensor, pattern, options, reason in (
        (query, SlidingWindow(9), {"dropout_p": 0.1, "dropout_seed": seed}, "no dropout"),
        (query, layout, {}, "do not divide tiles of 128"),
        (query, Strided(16), {}, "not made of whole blocks"),
        (leaf, SlidingWindow(9), {}, "no backward pass on a CPU"),
        (query, routed, {"entry_bias": bias}, "in no fixed order"),
        (query.to("meta"), SlidingWindow(9), {}, "tensors are on meta"),
    ):
        reasons = explain_backends(tensor, tensor, tensor, pattern, **options)
        assert reason in (reasons["flex"] or "")
    with torch.no_grad():
        assert explain_backends(leaf, leaf, leaf, SlidingWindow(9))["flex"] is None
        assert sparse_attention(leaf, leaf, leaf, SlidingWindow(9), backend="flex").shape == (
            query.shape
        )


def test_auto_takes_it_on_a_gpu_where_the_cuda_kernels_do_not_run(monkeypatch):
    verdicts = {"cuda": "no nvcc", "flex": None}
    for name, reason in verdicts.items():
        changed = backends.BACKENDS[name]._replace(unsupported=lambda call, reason=reason: reason)
        monkeypatch.setitem(backends.BACKENDS, name, changed)
    query = torch.zeros(1, 1, 4096, 16)
    call = make_call(query, query, query, SlidingWindow(9))
    assert backends.choose_backend(call).name != "flex"
    monkeypatch.setitem(backends.FUSED, "cpu", backends.FUSED["cuda"])
    assert backends.choose_backend(call).name == "flex"
