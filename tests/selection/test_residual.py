import pytest
import torch

from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.selection.reference import reference_choice, reference_votes
from adaptive_longformer.selection.residual import ResidualScores, residual_scores
from adaptive_longformer.selection.select_blocks import select_blocks

WINDOW = SlidingWindow(20)
OPTIONS = SelectionOptions(3, 16, 16)


def random_call(length, *, is_masked=False, rank=3, seed=0):
    """Query and key [2, 2, length, 8], their masks, and the two projections."""
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 2, 2, length, 8, generator=generator).double()
    projections = torch.randn(2, 2, rank, 8, generator=generator).double()
    masks = {}
    if is_masked:
        attention_mask = torch.ones(2, length, dtype=torch.bool)
        attention_mask[0, 90:130] = False
        attention_mask[1, length - length // 3 :] = False
        global_mask = torch.zeros(2, length, dtype=torch.bool)
        global_mask[:, [0, min(70, length - 10)]] = True
        masks = {"attention_mask": attention_mask, "global_mask": global_mask}
    return query, key, masks, projections


def ordinary_of(masks, length):
    if not masks:
        return torch.ones(2, length, dtype=torch.bool)
    return masks["attention_mask"] & ~masks["global_mask"]


def scores_by_hand(query, key, projections, ordinary, query_block_size=16, block_size=16):
    """[batch, heads, query_blocks, key_blocks], one pair of blocks at a time."""
    batch, heads, length, _ = query.shape

    def mean(tensor, b, h, block, size):
        inside = ordinary[b, block * size : (block + 1) * size]
        tokens = tensor[b, h, block * size : (block + 1) * size][inside]
        return tokens.mean(dim=0) if len(tokens) else tokens.new_zeros(tensor.shape[-1])

    sizes = [-(-length // size) for size in (query_block_size, block_size)]
    scores = query.new_zeros(batch, heads, *sizes)
    for b in range(batch):
        for h in range(heads):
            for i in range(sizes[0]):
                left = projections[0, h] @ mean(query, b, h, i, query_block_size)
                for j in range(sizes[1]):
                    right = projections[1, h] @ mean(key, b, h, j, block_size)
                    scores[b, h, i, j] = left @ right / projections.shape[2] ** 0.5
    return scores


@pytest.mark.parametrize(
    ("length", "is_masked", "query_block_size", "block_size"),
    [(203, False, 16, 16), (203, True, 32, 16), (170, True, 16, 32)],
)
def test_scores_are_products_of_projected_means(length, is_masked, query_block_size, block_size):
    query, key, masks, projections = random_call(length, is_masked=is_masked)
    ordinary = ordinary_of(masks, length)
    expected = scores_by_hand(query, key, projections, ordinary, query_block_size, block_size)
    query[~ordinary[:, None].expand(-1, 2, -1)] = torch.nan  # does not count
    query.requires_grad_()
    found = residual_scores(
        query, key, *projections, query_block_size=query_block_size, block_size=block_size,
        members=ordinary if is_masked else None,
    )  # fmt: skip
    torch.testing.assert_close(found.query @ found.key.mT, expected)
    entries = torch.randint(expected.shape[-1], (*expected.shape[:3], 5))
    torch.testing.assert_close(found.of_entries(entries), expected.gather(-1, entries))
    assert not found.query.requires_grad  # the means have no gradient


@pytest.mark.parametrize("is_masked", [False, True])
def test_blocks_are_ranked_by_soft_mass_times_the_score(is_masked):
    length = 203
    query, key, masks, projections = random_call(length, is_masked=is_masked)
    ordinary = ordinary_of(masks, length)
    members = ordinary if is_masked else None
    residual = residual_scores(
        query, key, *projections, query_block_size=16, block_size=16, members=members
    )
    selected = select_blocks(query, key, WINDOW, OPTIONS, residual=residual, **masks)
    plain = select_blocks(query, key, WINDOW, OPTIONS, **masks)
    assert not torch.equal(selected.key_blocks, plain.key_blocks)
    torch.testing.assert_close(selected.covered, plain.covered)
    scores = scores_by_hand(query, key, projections, ordinary)
    for b in range(2):
        for h in range(2):
            for row in range(selected.counts.shape[2]):
                share, _ = reference_votes(
                    query[b, h], key[b, h], row, WINDOW, OPTIONS,
                    valid=masks["attention_mask"][b] if is_masked else None,
                    is_global=masks["global_mask"][b] if is_masked else None,
                )  # fmt: skip
                weight = {j: mass * float(scores[b, h, row, j].exp()) for j, mass in share.items()}
                expected = reference_choice(weight, 3)
                count = int(selected.counts[b, h, row])
                assert selected.key_blocks[b, h, row, :count].tolist() == expected
                mass = selected.mass[b, h, row, :count].tolist()
                assert mass == pytest.approx([share[j] for j in expected])


@pytest.mark.parametrize("heads", [1, 2])
def test_after_a_beam_only_what_it_kept_is_ranked_again(heads):
    query, key, _, projections = random_call(700)
    query, key = query[:, :heads], key[:, :heads]
    residual = residual_scores(
        query, key, *projections[:, :heads], query_block_size=16, block_size=16
    )
    exact = select_blocks(query, key, WINDOW, OPTIONS, residual=residual)
    wide = SelectionOptions(3, 16, 16, start_nodes=5, beam_width=1000)
    beam = select_blocks(query, key, WINDOW, wide, residual=residual)
    assert torch.equal(beam.key_blocks, exact.key_blocks)
    narrow = SelectionOptions(3, 16, 16, start_nodes=5, beam_width=2)
    searched = select_blocks(query, key, WINDOW, narrow, residual=residual)
    # All that a beam of 2 nodes offers at the end, from the search without scores.
    offered = SelectionOptions(8, 16, 16, start_nodes=5, beam_width=2)
    candidates = select_blocks(query, key, WINDOW, offered).key_blocks
    is_candidate = (searched.key_blocks[..., None] == candidates[..., None, :]).any(dim=-1)
    assert is_candidate.all() and not torch.equal(searched.key_blocks, exact.key_blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start_nodes", [256, 4])
def test_scores_of_zero_change_no_choice(start_nodes, dtype):
    query, key, masks, projections = random_call(331, is_masked=True)
    query, key = query.to(dtype), key.to(dtype)
    options = SelectionOptions(5, 16, 16, start_nodes=start_nodes, beam_width=3)
    residual = residual_scores(
        query, key, projections[0], torch.zeros_like(projections[1]), query_block_size=16,
        block_size=16, members=ordinary_of(masks, 331),
    )  # fmt: skip
    plain = select_blocks(query, key, WINDOW, options, **masks)
    found = select_blocks(query, key, WINDOW, options, residual=residual, **masks)
    for name, first, second in zip(plain._fields, plain, found, strict=True):
        assert torch.equal(first, second), name


def test_scores_under_causality_are_refused():
    query, key, _, projections = random_call(100)
    residual = residual_scores(query, key, *projections, query_block_size=16, block_size=16)
    with pytest.raises(ValueError, match="residual is given, None is needed with is_causal"):
        select_blocks(query, key, WINDOW, OPTIONS, residual=residual, is_causal=True)


def test_factors_of_one_sequence_score_its_candidates():
    query, key = torch.randn(2, 5, 4), torch.randn(2, 9, 4)
    scores = ResidualScores(query, key)
    dense = query @ key.mT
    candidates = torch.randint(9, (2, 2, 3))
    expected = dense[:, 1:3].gather(-1, candidates)
    torch.testing.assert_close(scores.of_candidates(slice(1, 3), candidates), expected)
    torch.testing.assert_close(scores.of_candidates(slice(1, 3), None), dense[:, 1:3])
    assert scores.of_candidates(slice(1, 3), candidates + 2**30).isfinite().all()
