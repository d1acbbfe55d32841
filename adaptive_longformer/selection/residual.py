"""Residual scores: low-rank scores of pairs of blocks, learned on top of the model's own keys.

A block of queries i and a block of keys j get

    s(i, j) = <A mean query of i, B mean key of j> / sqrt(rank),

which is added to the logarithm of what the pyramid estimates. With B = 0, as it starts, nothing
changes. The means have no gradient: the scores learn to correct the choice, the queries and keys do
not learn to please the scores.

A and B learn through the weights of the blocks that are read.
"""

from typing import NamedTuple

import torch

from adaptive_longformer.selection.pyramid import key_pyramid


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
    residual_query: torch.Tensor,
    residual_key: torch.Tensor,
    *,
    query_block_size: int,
    block_size: int,
    members: torch.Tensor | None = None,
) -> ResidualScores:
    """The scores of all pairs of blocks, O(length) memory, with gradients of the two projections.

    Args:
        query, key: [batch, heads, length, head_dim].
        residual_query, residual_key: [heads, rank, head_dim], A and B of the formula.
        query_block_size, block_size: in tokens.
        members: bool [batch, length], the tokens that count in a mean; None: all. A block without
            any gets scores of 0.
    """
    with torch.autocast(query.device.type, enabled=False):
        query_means = _block_means(query, members, query_block_size)
        key_means = _block_means(key, members, block_size)
        return _project(query_means, key_means, residual_query, residual_key)


def _project(
    query_means: torch.Tensor,
    key_means: torch.Tensor,
    residual_query: torch.Tensor,
    residual_key: torch.Tensor,
) -> ResidualScores:
    dtype = query_means.dtype
    return ResidualScores(
        query_means @ residual_query.to(dtype).mT * residual_query.shape[1] ** -0.5,
        key_means @ residual_key.to(dtype).mT,
    )


def _block_means(tensor: torch.Tensor, members: torch.Tensor | None, size: int) -> torch.Tensor:
    """Means of the members of every block, [batch, heads, blocks, head_dim], without gradients."""
    num_blocks = -(-tensor.shape[2] // size)
    return key_pyramid(tensor.detach(), members, size, 1).means[0][:, :, :num_blocks]
