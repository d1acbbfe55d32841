"""The vote: which share of its attention a block of queries would give to each candidate."""

from typing import NamedTuple

import torch

from adaptive_longformer.selection.compiled_vote import can_vote, compiled_vote


class Votes(NamedTuple):
    """The outcome of one vote.

    Attributes:
        share: [heads, rows, candidates], soft mass of each candidate, averaged over sub-queries.
        covered: [heads, rows], soft mass of what is read anyway.
        weights: [heads, rows, sub_queries, fan_out * candidates], exp(score - peak) of their
            children.
        peak, others: [heads, rows, sub_queries], and the sum of all weights that are not covered.
    """

    share: torch.Tensor
    covered: torch.Tensor
    weights: torch.Tensor
    peak: torch.Tensor
    others: torch.Tensor


def vote(
    scores: torch.Tensor,
    bias: torch.Tensor,
    log_covered: torch.Tensor,
    log_dropped: torch.Tensor,
    voter_weight: torch.Tensor,
    fan_out: int,
) -> Votes:
    """Soft mass of candidates from the scores of their children, which it overwrites.

    Args:
        scores: [heads, rows, sub_queries, fan_out * candidates], contiguous.
        bias: [heads or 1, rows, fan_out * candidates], added to them: logarithms of the numbers of
            keys; -inf closes a child.
        log_covered, log_dropped: [heads, rows, sub_queries], logarithms of masses that belong to no
            candidate.
        voter_weight: [rows, sub_queries], what a sub-query counts in the mean.
        fan_out: children per candidate.
    """
    if can_vote(scores):
        share, covered, peak, others = compiled_vote(
            scores, bias, log_covered, log_dropped, voter_weight, fan_out
        )
        return Votes(share, covered, scores, peak, others)
    scores += bias[:, :, None]
    peak = torch.maximum(scores.amax(dim=-1), log_covered)
    peak = torch.maximum(peak, log_dropped).clamp(min=torch.finfo(scores.dtype).min)
    weights = scores.sub_(peak[..., None]).exp_()
    covered = (log_covered - peak).exp()
    others = weights.sum(dim=-1) + (log_dropped - peak).exp()
    total = (others + covered).clamp(min=torch.finfo(scores.dtype).tiny)
    share_of_one = voter_weight / total  # [heads, rows, sub_queries]
    share = (share_of_one[:, :, None] @ weights)[:, :, 0]
    share = share.unflatten(-1, (-1, fan_out)).sum(dim=-1)
    return Votes(share, (share_of_one * covered).sum(dim=-1), weights, peak, others)
