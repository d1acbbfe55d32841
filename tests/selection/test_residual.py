from functools import partial

import pytest
import torch

from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.selection.reference import reference_votes
from adaptive_longformer.selection.residual import (
    SAMPLED_BLOCKS,
    ResidualScores,
    residual_scores,
    router_divergence,
    router_targets,
    sampled_blocks,
)
from adaptive_longformer.selection.select_blocks import RoutingOptions, select_blocks

WINDOW = SlidingWindow(20)
ROUTING = RoutingOptions(3, 16, 16)


def random_call(length, *, is_masked=False, rank=3, seed=0):
    """Query and key [2, 2, length, 8], their masks, and the projections of a router."""
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


@pytest.mark.parametrize("top_p", [1.0, 0.6])
@pytest.mark.parametrize("is_masked", [False, True])
def test_blocks_are_ranked_by_soft_mass_times_the_score(is_masked, top_p):
    length = 203
    query, key, masks, projections = random_call(length, is_masked=is_masked)
    ordinary = ordinary_of(masks, length)
    members = ordinary if is_masked else None
    residual = residual_scores(
        query, key, *projections, query_block_size=16, block_size=16, members=members
    )
    selected = select_blocks(query, key, WINDOW, ROUTING, residual=residual, top_p=top_p, **masks)
    plain = select_blocks(query, key, WINDOW, ROUTING, top_p=top_p, **masks)
    assert not torch.equal(selected.key_blocks, plain.key_blocks)
    torch.testing.assert_close(selected.covered, plain.covered)
    scores = scores_by_hand(query, key, projections, ordinary)
    for b in range(2):
        for h in range(2):
            for row in range(selected.counts.shape[2]):
                share, covered = reference_votes(
                    query[b, h], key[b, h], row, WINDOW, ROUTING,
                    valid=masks["attention_mask"][b] if is_masked else None,
                    is_global=masks["global_mask"][b] if is_masked else None,
                )  # fmt: skip
                weight = {j: mass * float(scores[b, h, row, j].exp()) for j, mass in share.items()}
                expected, reached = [], covered
                for j in sorted(weight, key=lambda j: -weight[j]):
                    if len(expected) == 3 or weight[j] == 0 or (top_p < 1 and reached >= top_p):
                        break
                    expected.append(j)
                    reached += share[j]
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
    exact = select_blocks(query, key, WINDOW, ROUTING, residual=residual)
    wide = RoutingOptions(3, 16, 16, start_nodes=5, beam_width=1000)
    beam = select_blocks(query, key, WINDOW, wide, residual=residual)
    assert torch.equal(beam.key_blocks, exact.key_blocks)
    narrow = RoutingOptions(3, 16, 16, start_nodes=5, beam_width=2)
    searched = select_blocks(query, key, WINDOW, narrow, residual=residual)
    # All that a beam of 2 nodes offers at the end, from the search without scores.
    offered = RoutingOptions(8, 16, 16, start_nodes=5, beam_width=2)
    candidates = select_blocks(query, key, WINDOW, offered).key_blocks
    is_candidate = (searched.key_blocks[..., None] == candidates[..., None, :]).any(dim=-1)
    assert is_candidate.all() and not torch.equal(searched.key_blocks, exact.key_blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start_nodes", [256, 4])
def test_scores_of_zero_change_no_choice(start_nodes, dtype):
    query, key, masks, projections = random_call(331, is_masked=True)
    query, key = query.to(dtype), key.to(dtype)
    options = RoutingOptions(5, 16, 16, start_nodes=start_nodes, beam_width=3)
    residual = residual_scores(
        query, key, projections[0], torch.zeros_like(projections[1]), query_block_size=16,
        block_size=16, members=ordinary_of(masks, 331),
    )  # fmt: skip
    plain = select_blocks(query, key, WINDOW, options, top_p=0.9, **masks)
    found = select_blocks(query, key, WINDOW, options, top_p=0.9, residual=residual, **masks)
    for name, first, second in zip(plain._fields, plain, found, strict=True):
        assert torch.equal(first, second), name


def test_scores_under_causality_are_refused():
    query, key, _, projections = random_call(100)
    residual = residual_scores(query, key, *projections, query_block_size=16, block_size=16)
    with pytest.raises(ValueError, match="residual is given, None is needed with is_causal"):
        select_blocks(query, key, WINDOW, ROUTING, residual=residual, is_causal=True)


def test_sampled_blocks_are_one_of_each_quarter_and_a_matter_of_step_and_seed_only():
    num_blocks = torch.tensor([64, 7, 2, 1, 0])
    state = torch.random.get_rng_state()
    drawn = torch.stack([sampled_blocks(num_blocks, torch.tensor(s), 0) for s in range(500)])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert drawn.shape == (500, 5, SAMPLED_BLOCKS)
    assert torch.equal(drawn[:, 0] // 16, torch.arange(4).expand(500, -1))
    assert sorted(drawn[:, 0].unique().tolist()) == list(range(64))
    assert (drawn < num_blocks.clamp(min=1)[:, None]).all() and (drawn >= 0).all()
    assert torch.equal(drawn[3], sampled_blocks(num_blocks, torch.tensor(3), 0))
    other = torch.stack([sampled_blocks(num_blocks, torch.tensor(s), 1) for s in range(500)])
    assert (other[:, 0] != drawn[:, 0]).float().mean() > 0.8


def divergence_by_hand(query, key, masks, rows, projections, direction):
    """The two sums, one sampled query block, one head at a time."""
    length = query.shape[2]
    ordinary = ordinary_of(masks, length)
    valid = masks["attention_mask"] if masks else torch.ones(2, length, dtype=torch.bool)
    scores = scores_by_hand(query, key, projections, ordinary)
    position = torch.arange(length)
    block = position // 16
    num_blocks = int(block[-1]) + 1
    of_rows, of_heads = [], []
    for b in range(2):
        counts = torch.zeros(num_blocks).index_add(0, block, ordinary[b].float()).double()
        for h in range(2):
            masses, anywhere = [], torch.zeros(num_blocks, dtype=torch.bool)
            for row in rows[b].tolist():
                asks = [i for i in range(row * 16, min(row * 16 + 16, length)) if ordinary[b, i]]
                mass = torch.zeros(num_blocks).double()
                is_candidate = torch.zeros(num_blocks, dtype=torch.bool)
                for i in asks:
                    attention = (key[b, h] @ query[b, h, i] * 8**-0.5).masked_fill(
                        ~valid[b], -torch.inf
                    ).softmax(dim=0)  # fmt: skip
                    far = ordinary[b] & ((position - i).abs() > 20)
                    mass.index_add_(0, block[far], attention[far])
                    is_candidate[block[far]] = True
                if not is_candidate.any():
                    continue
                mass = mass / mass.sum()
                share, _ = reference_votes(
                    query[b, h], key[b, h], row, WINDOW, ROUTING, valid=valid[b],
                    is_global=valid[b] & ~ordinary[b],
                )  # fmt: skip
                expected = torch.tensor([share.get(j, 0.0) for j in range(num_blocks)])
                logits = expected.double().log() + scores[b, h, row]
                log_model = logits.masked_fill(~is_candidate, -torch.inf).log_softmax(dim=0)
                inside = is_candidate
                of_rows.append((mass * (mass.log() - log_model))[inside].sum())
                masses.append(mass)
                anywhere |= is_candidate
            if not masses:
                continue
            mean = torch.stack(masses).mean(dim=0)
            means = torch.stack([
                key[b, h, (block == j) & ordinary[b]].mean(dim=0) for j in range(num_blocks)
            ]).nan_to_num()  # fmt: skip
            logits = (means @ direction[h] + counts.log()).masked_fill(~anywhere, -torch.inf)
            log_model = logits.log_softmax(dim=0)
            of_heads.append((mean * (mean.log() - log_model))[anywhere].sum())
    return torch.stack(of_rows).mean(), torch.stack(of_heads).mean()


@pytest.mark.parametrize(
    ("length", "is_masked", "rows"),
    [
        (203, False, [[0, 3, 7, 12], [1, 5, 6, 12]]),
        (203, True, [[0, 3, 7, 12], [1, 5, 6, 12]]),  # the last one of row 1 is padding
        (45, True, [[0, 1, 1, 2], [0, 0, 1, 1]]),
    ],
)
def test_the_auxiliary_loss_is_the_divergence_from_exact_attention(length, is_masked, rows):
    query, key, masks, projections = random_call(length, is_masked=is_masked)
    direction = torch.randn(2, 8, generator=torch.Generator().manual_seed(1)).double()
    rows = torch.tensor(rows)
    expected = divergence_by_hand(query, key, masks, rows, projections, direction)
    if is_masked:  # whatever padding holds
        for tensor in (query, key):
            tensor[~masks["attention_mask"][:, None].expand(-1, 2, -1)] = torch.nan
    targets = router_targets(
        query, key, WINDOW, rows, block_size=16, query_block_size=16, tokens_per_vote=4, **masks
    )
    found = router_divergence(targets, *projections, None)
    torch.testing.assert_close(found, expected[0])
    of_direction = router_divergence(targets, None, None, direction)
    torch.testing.assert_close(of_direction, expected[1])
    both = router_divergence(targets, *projections, direction)
    torch.testing.assert_close(both, found + of_direction)
    assert found > 0 and of_direction > 0
    leaves = [*(tensor.clone().requires_grad_() for tensor in projections), direction]
    leaves[2].requires_grad_()
    assert torch.autograd.gradcheck(partial(router_divergence, targets), leaves)


def test_the_auxiliary_loss_vanishes_where_nothing_can_be_chosen():
    query, key, _, projections = random_call(18)
    rows = torch.zeros(2, 4, dtype=torch.int64)
    targets = router_targets(
        query, key, WINDOW, rows, block_size=16, query_block_size=16, tokens_per_vote=4
    )
    leaves = [tensor.requires_grad_() for tensor in (*projections, torch.randn(2, 8).double())]
    loss = router_divergence(targets, *leaves)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, leaves):
        assert not gradient.any()


def test_the_auxiliary_loss_finds_a_direction_that_summaries_do_not_see():
    """The key a query asks for is cancelled in its block's mean; other channels tell the block."""
    generator = torch.Generator().manual_seed(0)
    length, blocks = 320, 20
    query = torch.randn(1, 1, length, 8, generator=generator) * 0.1
    key = torch.randn(1, 1, length, 8, generator=generator) * 0.1
    query[..., :4] += torch.eye(4)[torch.arange(length) // 16 % 4]
    # One strong key among 16 that cancel it, so that the mean of its block shows nothing of it.
    answers = torch.eye(4)[torch.arange(blocks) % 4]
    key[0, 0, ::16, :4] += 12 * answers
    key[0, 0, 1::16, :4] -= 12 * answers
    key[..., 4:] += torch.eye(4)[torch.arange(length) // 16 % 4]
    parameters = [torch.randn(1, 4, 8, generator=generator) * 0.3, torch.zeros(1, 4, 8)]
    parameters = [tensor.requires_grad_() for tensor in parameters]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    rows = torch.tensor([[2, 7, 12, 17]])  # one of each topic
    targets = router_targets(
        query, key, WINDOW, rows, block_size=16, query_block_size=16, tokens_per_vote=4,
        sub_blocks=1,
    )  # fmt: skip
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = router_divergence(targets, *parameters, None)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    options = RoutingOptions(3, 16, 16, sub_block_size=16)
    residual = residual_scores(query, key, *parameters, query_block_size=16, block_size=16)
    found = []
    for scores in (None, residual.detach()):
        selected = select_blocks(query, key, WINDOW, options, residual=scores)
        is_right = selected.key_blocks[0, 0] % 4 == (torch.arange(blocks) % 4)[:, None]
        found.append(float(is_right.float().mean()))
    # Also for query blocks that no step has looked at.
    assert found[0] < 0.5 and found[1] > 0.9


def test_factors_of_one_sequence_score_its_candidates():
    query, key = torch.randn(2, 5, 4), torch.randn(2, 9, 4)
    scores = ResidualScores(query, key)
    dense = query @ key.mT
    candidates = torch.randint(9, (2, 2, 3))
    expected = dense[:, 1:3].gather(-1, candidates)
    torch.testing.assert_close(scores.of_candidates(slice(1, 3), candidates), expected)
    torch.testing.assert_close(scores.of_candidates(slice(1, 3), None), dense[:, 1:3])
    assert scores.of_candidates(slice(1, 3), candidates + 2**30).isfinite().all()
