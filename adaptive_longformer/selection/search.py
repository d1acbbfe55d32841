"""The search of a run of query blocks through the pyramid, from coarse nodes down to blocks."""

import torch

from adaptive_longformer.selection.options import blocks_per_node, ceil_div
from adaptive_longformer.selection.pyramid import FAN_OUT
from adaptive_longformer.selection.rows import Row
from adaptive_longformer.selection.vote import Votes, vote

_NO_NODE = 2**30


class Search:
    """The search for the query blocks [start, end) of a row. Tensors are [heads, rows, ...]."""

    def __init__(self, row: Row, start: int, end: int) -> None:
        rows = torch.arange(start, end, device=row.batch.device)
        self.row, self.rows = row, rows
        self.is_causal, self.beam_width = row.call.is_causal, row.options.beam_width
        # Which of the given query blocks they are.
        self.given = slice(start - row.batch.first_row, end - row.batch.first_row)
        self.queries = row.queries[:, self.given]  # [heads, rows, votes, head_dim]
        is_voter = row.is_voter[self.given].to(self.queries.dtype)
        # A sub-query's weight in the mean, [rows, votes].
        self.voter_weight = is_voter / is_voter.sum(dim=-1, keepdim=True).clamp(min=1.0)
        self.limit, self.last_limit = row.limit(rows), row.limits[end - 1]
        self.first_covered, self.last_covered = row.covered(rows)
        self.log_covered = self._log_covered()  # [heads, rows, votes]
        self.log_dropped = torch.full_like(self.log_covered, -torch.inf)

    def run(self, level: int) -> tuple[Votes, torch.Tensor, torch.Tensor]:
        """Votes over blocks that begin at a level of the pyramid and keep the best on the way.

        Returns:
            The votes, the blocks voted on, int64 [heads or 1, rows or 1, candidates], and which of
            these are open.
        """
        votes, candidates, is_open = self._vote_all(level)
        while level > 1:
            kept = self._keep(votes, candidates, is_open, level)
            level -= 1
            votes, candidates, is_open = self._vote_children(kept, level)
        return votes, candidates, is_open

    def _log_covered(self) -> torch.Tensor:
        """Logarithm of the mass of global tokens and of the blocks that the window covers."""
        parts = [self.queries.new_full(self.queries.shape[:3], -torch.inf)]
        row, rows = self.row, self.rows
        if row.global_positions is not None:
            scores = self.queries.flatten(1, 2) @ row.global_keys.mT
            end = rows[:, None, None] * row.options.query_block_size
            is_seen = row.global_positions < (end if self.is_causal else row.batch.length)
            scores = scores.unflatten(1, (len(rows), -1)).masked_fill(~is_seen, -torch.inf)
            parts.append(scores.logsumexp(dim=-1))
        blocks = torch.arange(row.covered_width, device=rows.device) + self.first_covered[:, None]
        run = row.options.sub_blocks
        is_closed = (blocks > self.last_covered[:, None]).repeat_interleave(run, dim=-1)
        scores, log_counts = self._gather(blocks.expand(self.queries.shape[0], -1, -1), 0, run)
        scores += log_counts.masked_fill(is_closed, -torch.inf)[:, :, None]
        parts.append(scores.logsumexp(dim=-1))
        return torch.stack(parts).logsumexp(dim=0)

    def _gather(
        self, nodes: torch.Tensor, level: int, run: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the descendants, at a level, of nodes above it would get.

        Args:
            nodes: int64 [heads, rows, width]; beyond the level's end they have no descendants.
            level: of the descendants.
            run: descendants per node.

        Returns:
            Scores of their means [heads, rows, sub_queries, width * run], and their log counts
            [heads, rows, width * run].
        """
        heads, rows, width = nodes.shape
        means, log_counts = self.row.means[level], self.row.log_counts[level]
        num_runs = means.shape[1] // run
        index = nodes.clamp(0, num_runs - 1)
        head = torch.arange(heads, device=nodes.device)[:, None, None]
        flat = (index + head * num_runs).flatten()
        picked = means.reshape(heads * num_runs, -1).index_select(0, flat)
        picked = picked.view(heads * rows, width * run, -1)
        scores = torch.bmm(self.queries.reshape(heads * rows, -1, picked.shape[-1]), picked.mT)
        log_counts = log_counts.view(num_runs, run).index_select(0, index.flatten())
        log_counts = log_counts.masked_fill_((nodes >= num_runs).view(-1, 1), -torch.inf)
        return scores.view(heads, rows, -1, width * run), log_counts.view(heads, rows, -1)

    def _vote_all(self, level: int) -> tuple[Votes, torch.Tensor, torch.Tensor]:
        """The vote over all nodes of a level: votes, candidates [1, 1, nodes], and which are
        open.
        """
        rows = self.queries.shape[1]
        span = blocks_per_node(level)
        num_nodes = ceil_div(self.row.num_blocks, span)
        if self.is_causal:
            num_nodes = min(num_nodes, ceil_div(self.last_limit, span))
        num_nodes = max(num_nodes, 1)
        candidates = torch.arange(num_nodes, device=self.rows.device).view(1, 1, -1)
        children = slice(0, num_nodes * self.row.options.fan_out(level))
        means = self.row.means[level - 1][:, children]
        scores = (self.queries.flatten(1, 2) @ means.mT).unflatten(1, (rows, -1))
        bias = self.row.log_counts[level - 1][children].expand(1, rows, -1)
        return self._vote(scores, bias, candidates, level)

    def _keep(
        self, votes: Votes, candidates: torch.Tensor, is_open: torch.Tensor, level: int
    ) -> torch.Tensor:
        """The best nodes of a level, int64 [heads, rows, kept], with the node that is cut by the
        limit under causality; what is dropped stays in the denominator of later votes.
        """
        width = min(self.beam_width, votes.share.shape[-1])
        share = votes.share.masked_fill(~is_open, -1.0)
        order = share.topk(width, dim=-1).indices.sort(dim=-1).values
        is_kept = torch.zeros_like(share).scatter_(-1, order, 1.0)
        kept_weight = votes.weights @ is_kept.repeat_interleave(FAN_OUT, -1)[..., None]
        dropped = (votes.others - kept_weight[..., 0]).clamp(min=0.0)
        self.log_dropped = votes.peak + dropped.log()
        kept = candidates.expand_as(share).gather(-1, order)
        if self.is_causal:
            # The node that the limit cuts is always split, and by this copy only.
            kept = kept.where(is_open.expand_as(share).gather(-1, order), _NO_NODE)
            cut = self.limit // blocks_per_node(level)
            kept = torch.cat([kept, cut[None, :, None].expand(kept.shape[0], -1, -1)], dim=-1)
        return kept

    def _vote_children(
        self, kept: torch.Tensor, level: int
    ) -> tuple[Votes, torch.Tensor, torch.Tensor]:
        """The vote over the children, at a level, of the nodes kept above it."""
        offsets = torch.arange(FAN_OUT, device=kept.device)
        candidates = (kept[..., None] * FAN_OUT + offsets).flatten(-2)
        run = FAN_OUT * self.row.options.fan_out(level)
        scores, log_counts = self._gather(kept, level - 1, run)
        return self._vote(scores, log_counts, candidates, level)

    def _vote(
        self, scores: torch.Tensor, bias: torch.Tensor, candidates: torch.Tensor, level: int
    ) -> tuple[Votes, torch.Tensor, torch.Tensor]:
        """The vote over nodes of a level from the scores and log counts of their children."""
        bias = self._close(bias, candidates, level)
        fan_out = self.row.options.fan_out(level)
        votes = vote(scores, bias, self.log_covered, self.log_dropped, self.voter_weight, fan_out)
        # A candidate is open if it has a child that may be chosen.
        is_open = (bias > -torch.inf).unflatten(-1, (-1, fan_out)).any(dim=-1)
        return votes, candidates, is_open

    def _close(self, bias: torch.Tensor, candidates: torch.Tensor, level: int) -> torch.Tensor:
        """A bias of the candidates' children, -inf where they may not be chosen.

        Args:
            bias: [heads or 1, rows, fan_out * candidates].
            candidates: nodes of `level`, int64 [heads or 1, rows or 1, candidates].
        """
        if level > 1:
            offsets = torch.arange(FAN_OUT, device=candidates.device)
            children = (candidates[..., None] * FAN_OUT + offsets).flatten(-2)
            first = children * blocks_per_node(level - 1)
            last = (first + blocks_per_node(level - 1)).clamp(max=self.row.num_blocks) - 1
        else:
            first = last = candidates.repeat_interleave(self.row.options.sub_blocks, dim=-1)
        is_covered = (first >= self.first_covered[:, None]) & (last <= self.last_covered[:, None])
        if self.is_causal:
            ends = (candidates + 1) * blocks_per_node(level)
            is_cut = ends > self.limit[:, None]
            is_cut = is_cut.repeat_interleave(self.row.options.fan_out(level), dim=-1)
            is_covered = is_covered | is_cut
        return bias.masked_fill(is_covered, -torch.inf)
