"""The residual router: low-rank scores of pairs of blocks, learned on top of the model's own keys.

A block of queries i and a block of keys j get

    s(i, j) = <A mean query of i, B mean key of j> / sqrt(rank),

which is added to the logarithm of what the pyramid estimates. With B = 0, as it starts, nothing
changes. The means have no gradient: the scores learn to correct the choice, the queries and keys do
not learn to please the scores.

A and B learn through the weights of the blocks that are read, and, as what is never read gets no
gradient there, through an auxiliary loss on a few blocks of queries: the divergence of the softmax
of all scores from the exact attention to the blocks.
"""

from typing import NamedTuple

import torch

from adaptive_longformer.patterns.mixing import mix
from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.selection.pyramid import FAN_OUT, key_pyramid

# Query blocks per sequence and step that the auxiliary loss looks at.
SAMPLED_BLOCKS = 4
_GOLDEN = 0x9E3779B1


class ResidualScores(NamedTuple):
    """Scores of pairs of blocks as two factors.

    Attributes:
        query: [batch, heads, query_blocks, rank]; without batch where one sequence is meant.
        key: [batch, heads, key_blocks, rank].
    """

    query: torch.Tensor
    key: torch.Tensor

    def detach(self) -> "ResidualScores":
        """The same without gradients."""
        return ResidualScores(self.query.detach(), self.key.detach())

    def of_entries(self, key_blocks: torch.Tensor) -> torch.Tensor:
        """The scores of a list of key blocks per query block.

        Args:
            key_blocks: int [batch, heads, query_blocks, entries].

        Returns:
            The shape of key_blocks.
        """
        index = key_blocks.long().flatten(2)[..., None]
        keys = self.key.take_along_dim(index, dim=2).unflatten(2, key_blocks.shape[2:])
        return (keys * self.query[:, :, :, None]).sum(dim=-1)

    def of_candidates(self, rows: slice, candidates: torch.Tensor | None) -> torch.Tensor:
        """The scores of the candidates of a search, of the factors of one sequence.

        Args:
            rows: which query blocks.
            candidates: int64 [heads, query_blocks, candidates], ids beyond the last block get any
                score; None: all blocks.
        """
        query = self.query[:, rows]  # [heads, query_blocks, rank]
        if candidates is None:
            return query @ self.key.mT
        index = candidates.clamp(max=self.key.shape[1] - 1).flatten(1)[..., None]
        keys = self.key.take_along_dim(index, dim=1).unflatten(1, candidates.shape[1:])
        return (keys @ query[..., None])[..., 0]


def residual_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    router_query: torch.Tensor,
    router_key: torch.Tensor,
    *,
    query_block_size: int,
    block_size: int,
    members: torch.Tensor | None = None,
) -> ResidualScores:
    """The scores of all pairs of blocks, O(length) memory, with gradients of the two projections.

    Args:
        query, key: [batch, heads, length, head_dim].
        router_query, router_key: [heads, rank, head_dim], A and B of the formula.
        query_block_size, block_size: in tokens.
        members: bool [batch, length], the tokens that count in a mean; None: all. A block without
            any gets scores of 0.
    """
    with torch.autocast(query.device.type, enabled=False):
        query_means = _block_means(query, members, query_block_size)
        key_means = _block_means(key, members, block_size)
        return _project(query_means, key_means, router_query, router_key)


class RouterTargets(NamedTuple):
    """What the auxiliary loss of one layer needs of a forward pass; nothing in it has a gradient.

    Attributes:
        mass: [batch, heads, sampled, key_blocks], exact attention of sampled query blocks to what a
            choice could add, as shares that sum to 1; 0 where there is nothing to add.
        is_candidate: bool, the same shape but for the heads: where there is something to add.
        log_share: shape of mass, what the pyramid expects of it, up to a constant per query block.
        query_means: [batch, heads, sampled, head_dim].
        key_means: [batch, heads, key_blocks, head_dim].
        log_counts: [batch or 1, key_blocks], logarithm of the tokens of a block.
    """

    mass: torch.Tensor
    is_candidate: torch.Tensor
    log_share: torch.Tensor
    query_means: torch.Tensor
    key_means: torch.Tensor
    log_counts: torch.Tensor


def sampled_blocks(num_blocks: torch.Tensor, step: torch.Tensor, seed: int) -> torch.Tensor:
    """`SAMPLED_BLOCKS` blocks of every sequence, one of each quarter, by a hash of step and seed.

    Args:
        num_blocks: int64 [batch], blocks of each sequence.
        step: int64 scalar tensor.
        seed: a small number, such as that of the layer.

    Returns:
        int64 [batch, SAMPLED_BLOCKS], ascending; with fewer blocks than that some come twice.
    """
    quarter = torch.arange(SAMPLED_BLOCKS, device=num_blocks.device)
    draw = mix(mix(step + seed * _GOLDEN) ^ mix(quarter + _GOLDEN))  # below 2**32
    block = ((quarter << 32) + draw) * num_blocks[:, None] // (SAMPLED_BLOCKS << 32)
    return block


@torch.no_grad()
def router_targets(
    query: torch.Tensor,
    key: torch.Tensor,
    window: SlidingWindow,
    rows: torch.Tensor,
    *,
    block_size: int,
    query_block_size: int,
    tokens_per_vote: int,
    sub_blocks: int = FAN_OUT,
    attention_mask: torch.Tensor | None = None,
    global_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> RouterTargets:
    """Compares sampled query blocks with all keys, exactly and as the pyramid does.

    A choice could add the keys outside of the window that are neither padding nor global. Memory
    for the scores of one query block against all keys at a time: O(length).

    Args:
        query, key: [batch, heads, length, head_dim].
        window: what is read anyway.
        rows: int64 [batch, sampled], query blocks.
        block_size, query_block_size, tokens_per_vote, sub_blocks: as in `RoutingOptions`.
        attention_mask, global_mask: bool [batch, length], as in `select_blocks`.
        scale: factor of the scores; None: head_dim**-0.5.
    """
    with torch.autocast(query.device.type, enabled=False):
        batch, _, length, head_dim = query.shape
        factor = head_dim**-0.5 if scale is None else scale
        device, size = query.device, query_block_size
        valid = torch.ones(batch, length, dtype=torch.bool, device=device)
        if attention_mask is not None:
            valid = attention_mask
        ordinary = valid if global_mask is None else valid & ~global_mask
        dtype = torch.promote_types(query.dtype, torch.float32)
        key = key.to(dtype).masked_fill(~valid[:, None, :, None], 0.0)
        num_blocks = -(-length // block_size)
        pyramid = key_pyramid(key, ordinary, block_size // sub_blocks, 2, sub_blocks)
        position = torch.arange(length, device=device)
        parts = []
        for row in rows.unbind(1):  # a handful, whatever the length
            tokens = row[:, None] * size + torch.arange(size, device=device)  # [batch, size]
            inside = tokens.clamp(max=length - 1)
            asks = (tokens < length) & ordinary.take_along_dim(inside, dim=1)
            picked = query.take_along_dim(inside[:, None, :, None], dim=2).to(dtype)
            picked = picked.masked_fill(~asks[:, None, :, None], 0.0)  # padding may hold anything
            offset = position - tokens[..., None]  # [batch, size, length]
            assert window.right is not None
            is_far = (offset < -window.left) | (offset > window.right)
            is_far = is_far & ordinary[:, None] & asks[..., None]
            scores = picked @ key.mT * factor
            scores = scores.masked_fill(~valid[:, None, None], -torch.inf)
            attention = scores.softmax(dim=-1).masked_fill(~is_far[:, None], 0.0).sum(dim=2)
            mass = _sum_blocks(attention, block_size)  # [batch, heads, key_blocks]
            is_candidate = _sum_blocks(is_far.any(dim=1).float(), block_size)[:, None] > 0
            log_share = _log_share(
                picked, asks, key, pyramid.means[0], pyramid.log_counts[0],
                valid & ~ordinary, tokens_per_vote, factor,
            )  # fmt: skip
            log_share = log_share.unflatten(-1, (-1, sub_blocks)).logsumexp(dim=-1)
            count = asks.sum(dim=1).clamp(min=1)[:, None, None]
            means = picked.sum(dim=2) / count  # [batch, heads, head_dim]
            share = mass / mass.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
            parts.append((share, is_candidate, log_share[..., :num_blocks], means))
        mass, is_candidate, log_share, query_means = (
            torch.stack(part, dim=2) for part in zip(*parts, strict=True)
        )
        return RouterTargets(
            mass, is_candidate, log_share, query_means, pyramid.means[1][:, :, :num_blocks],
            pyramid.log_counts[1][:, :num_blocks],
        )  # fmt: skip


def router_divergence(
    targets: RouterTargets,
    router_query: torch.Tensor | None,
    router_key: torch.Tensor | None,
    global_direction: torch.Tensor | None,
) -> torch.Tensor:
    """The auxiliary loss, with gradients of the arguments that are given.

    For the residual scores KL(exact mass || softmax(log expected share + s)), mean over sequences,
    heads and sampled query blocks that have something to choose. For the direction of the learned
    global blocks, as these serve all query blocks, KL(mean exact mass || softmax(direction . mean
    key + log count)). The sum of both.

    Args:
        targets: of a layer.
        router_query, router_key: [heads, rank, head_dim] or None.
        global_direction: [heads, head_dim] or None.
    """
    with torch.autocast(targets.mass.device.type, enabled=False):
        total = targets.mass.new_zeros(())
        if router_query is not None and router_key is not None:
            query, key = _project(targets.query_means, targets.key_means, router_query, router_key)
            scores = targets.log_share + query @ key.mT
            total = total + _divergence(targets.mass, scores, targets.is_candidate)
        if global_direction is not None:
            direction = global_direction.to(targets.key_means.dtype)[:, :, None]
            scores = (targets.key_means @ direction)[..., 0] + targets.log_counts[:, None]
            has_mass = targets.is_candidate.any(dim=-1).sum(dim=2)[..., None]
            mass = targets.mass.sum(dim=2) / has_mass.clamp(min=1)
            total = total + _divergence(mass, scores, targets.is_candidate.any(dim=2))
        return total


def _divergence(
    mass: torch.Tensor, scores: torch.Tensor, is_candidate: torch.Tensor
) -> torch.Tensor:
    """KL(mass || softmax of the candidates' scores), mean over the rows that have candidates."""
    is_candidate = is_candidate.expand_as(mass)
    closed = scores.masked_fill(~is_candidate, torch.finfo(scores.dtype).min)
    log_model = closed.log_softmax(dim=-1).masked_fill(~is_candidate, 0.0)
    divergence = (torch.xlogy(mass, mass) - mass * log_model).sum(dim=-1)
    return divergence.sum() / is_candidate.any(dim=-1).sum().clamp(min=1)


def _log_share(
    picked: torch.Tensor,
    asks: torch.Tensor,
    key: torch.Tensor,
    means: torch.Tensor,
    log_counts: torch.Tensor,
    is_global: torch.Tensor,
    tokens_per_vote: int,
    scale: float,
) -> torch.Tensor:
    """Logarithm of the share of its attention that a query block expects to spend in every node,
    [batch, heads, nodes].

    Args:
        picked: the block's queries [batch, heads, size, head_dim]; asks: bool [batch, size].
        key: [batch, heads, length, head_dim].
        means, log_counts: of the nodes [batch, heads, nodes, head_dim], [batch, nodes].
        is_global: bool [batch, length].
        tokens_per_vote: queries per sub-query.
        scale: factor of the scores.
    """
    votes = key_pyramid(picked, asks, tokens_per_vote, 1)
    num_votes = picked.shape[2] // tokens_per_vote
    sub_queries = votes.means[0][:, :, :num_votes] * scale
    is_voter = votes.log_counts[0][:, :num_votes] > -torch.inf  # [batch, votes]
    scores = sub_queries @ means.mT + log_counts[:, None, None]  # [batch, heads, votes, nodes]
    globals_ = (sub_queries @ key.mT).masked_fill(~is_global[:, None, None], -torch.inf)
    total = torch.logaddexp(scores.logsumexp(dim=-1), globals_.logsumexp(dim=-1))
    # A sequence without any key has no total, a sub-query without queries no vote.
    has_vote = is_voter[:, None] & (total > -torch.inf)
    scores = scores - total.masked_fill(~has_vote, 0.0)[..., None]
    log_share = scores.masked_fill(~has_vote[..., None], -torch.inf).logsumexp(dim=2)
    return log_share - is_voter.sum(dim=-1).clamp(min=1).log()[:, None, None]


def _project(
    query_means: torch.Tensor,
    key_means: torch.Tensor,
    router_query: torch.Tensor,
    router_key: torch.Tensor,
) -> ResidualScores:
    dtype = query_means.dtype
    return ResidualScores(
        query_means @ router_query.to(dtype).mT * router_query.shape[1] ** -0.5,
        key_means @ router_key.to(dtype).mT,
    )


def _block_means(tensor: torch.Tensor, members: torch.Tensor | None, size: int) -> torch.Tensor:
    """Means of the members of every block, [batch, heads, blocks, head_dim], without gradients."""
    num_blocks = -(-tensor.shape[2] // size)
    return key_pyramid(tensor.detach(), members, size, 1).means[0][:, :, :num_blocks]


def _sum_blocks(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Sums over blocks of the last dimension."""
    filler = -tensor.shape[-1] % size
    return torch.nn.functional.pad(tensor, (0, filler)).unflatten(-1, (-1, size)).sum(dim=-1)
