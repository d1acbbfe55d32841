"""Block-sparse attention in plain PyTorch: O(n) memory, forward and backward, on any device.

The queries are walked in tiles. A tile reads one concatenation of keys: the slice its window covers
(a view, nothing is gathered), the packed global keys, and the key blocks that its list names
besides the window. Scores live only inside a tile, sized to stay in cache on a CPU; the backward
pass recomputes them from the saved log-sum-exp.

`blocked_attention` and its backward pass are torch.library operators, so torch.compile sees one
node with fixed shapes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from adaptive_longformer.attention.call import AttentionCall
from adaptive_longformer.attention.dropout import column_keys, keep_words, row_keys, zero_dropped_
from adaptive_longformer.attention.memory_format import like_projection
from adaptive_longformer.attention.operator import define_operator, run_operator
from adaptive_longformer.attention.padding import ordinary_tokens, readable
from adaptive_longformer.attention.reference import MIN_WEIGHT
from adaptive_longformer.patterns.block_layout import BlockLayout, EntryFlag, split_window
from adaptive_longformer.patterns.sliding_window import SlidingWindow

# Scores per tile: 4 MB of float32 stay in a CPU's cache (measured best of 0.5 to 8 MB); a GPU wants
# large launches.
_TILE_SCORES = {"cpu": 2**20, "cuda": 2**25}
_TILE_ROWS = {"cpu": 128, "cuda": 512}


def blocked_supports(call: AttentionCall) -> str | None:
    """None, or why the blocked backend cannot run the call."""
    return None


def run_blocked(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [batch, heads, length, head_dim] and log-sum-exp [batch, heads, length] of a call."""
    return run_operator(blocked_attention, call)


@dataclass
class _Tile:
    """Where a tile is: batch rows, heads, query rows [start, end), and the columns its window
    covers [first, last).
    """

    batch: slice
    heads: slice
    start: int
    end: int
    first: int
    last: int

    @property
    def at(self) -> tuple[slice, slice, slice]:
        return self.batch, self.heads, slice(self.start, self.end)


class _Problem:
    """The inputs of one call, prepared once for the forward or the backward walk over the tiles."""

    def __init__(self, call: AttentionCall) -> None:
        query, key, value = call.query, call.key, call.value
        self.batch, self.heads, self.length, self.head_dim = query.shape
        self.device, self.is_causal = query.device, call.is_causal
        self.scale, self.dropout_p = call.scale, call.dropout_p
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        # Low precision stays on the matrix units of a GPU; a CPU has none, and is more exact in
        # float32.
        self.matmul_dtype = query.dtype if query.device.type == "cuda" else self.dtype
        query, key, value = readable(query, key, value, call.attention_mask)
        self.query, self.key, self.value = query, key, value
        self.span_length, self.span_ramp = call.span or (None, 1.0)

        extra, window = _lists_and_window(call)
        self.extra = extra
        self.entry_bias = call.entry_bias
        if extra is not None:
            self._drop_window_entries(extra, call.entry_bias)
        self.window = window
        if window is None:
            self.left, self.right = 0, -1
        else:
            assert isinstance(window, SlidingWindow) and window.right is not None
            self.left = min(window.left, self.length)
            self.right = 0 if self.is_causal else min(window.right, self.length)
            if self.span_length is not None:
                self._narrow_to_span(self.span_length)
        self.tile_rows = min(_TILE_ROWS.get(self.device.type, 128), max(self.length, 1))
        if self.extra is not None:
            self.tile_rows = self.extra.query_block_size
        self.band = self._band()
        self.span_tables = self._span_tables()

        # [batch, length]: ordinary keys
        near_valid = self.near_valid = ordinary_tokens(call.attention_mask, call.global_mask)
        self.positions = None
        if call.global_keys is not None and call.global_keys.packed().shape[1] > 0:
            self.positions = call.global_keys.packed()  # [batch, G]
            self.position_valid = self.positions < self.length
            self.safe_positions = self.positions.clamp(max=self.length - 1)
        self.near_invalid_before = None
        if near_valid is not None and self.device.type == "cpu":
            zero = torch.zeros(self.batch, 1, dtype=torch.int64)
            self.near_invalid_before = torch.cat(
                [zero, (~near_valid).cumsum(dim=1)], dim=1
            ).tolist()
        if self.dropout_p > 0:
            assert call.dropout_seed is not None
            self.row_keys = row_keys(call.dropout_seed, self.batch, self.heads, self.length)
            self.column_keys = column_keys(call.dropout_seed, self.length)
        if self.extra is not None:
            self.key_tiles, self.value_tiles = self._as_blocks(key), self._as_blocks(value)

    def _drop_window_entries(self, layout: BlockLayout, entry_bias: torch.Tensor | None) -> None:
        """Keeps only the entries besides the window, and remembers where they stood for the bias
        and its gradient.
        """
        keep = ((layout.flags & EntryFlag.WINDOW) == 0) & layout.used
        counts = keep.sum(dim=-1, dtype=torch.int32)
        width = int(counts.max()) if counts.numel() else 0
        if width == 0:
            self.extra, self.entry_bias = None, None
            return
        self.entry_order = torch.argsort(keep.int(), dim=-1, descending=True, stable=True)[
            ..., :width
        ]
        self.extra = layout.select(keep)
        if entry_bias is not None:
            shape = torch.broadcast_shapes(entry_bias.shape, layout.key_blocks.shape)
            order = self.entry_order.expand(*shape[:3], width)
            self.entry_bias = entry_bias.to(self.dtype).expand(shape).gather(-1, order)
        self.all_full = bool(
            ((self.extra.flags & EntryFlag.FULL) != 0).where(self.extra.used, True).all()
        )
        self.entries_per_block = self.extra.counts.amax(dim=(0, 1)).tolist()

    def _as_blocks(self, tensor: torch.Tensor) -> torch.Tensor:
        """[batch, heads, length, head_dim] -> [batch * heads * key_blocks, key_block_size *
        head_dim]
        """
        assert self.extra is not None
        filler = self.extra.num_key_blocks * self.extra.key_block_size - self.length
        padded = torch.nn.functional.pad(tensor, (0, 0, 0, filler))
        return padded.reshape(-1, self.extra.key_block_size * self.head_dim)

    def _narrow_to_span(self, span_length: torch.Tensor) -> None:
        """Leaves out the columns in which no head has any weight."""
        longest = float(span_length.detach().max()) + self.span_ramp
        if math.isfinite(longest):
            reach = max(math.ceil(longest) - 1, 0)
            self.left, self.right = min(self.left, reach), min(self.right, reach)

    def _band_offsets(self) -> torch.Tensor:
        """Key position minus query position, in a tile whose first row has all its columns: [rows,
        columns].
        """
        row = torch.arange(self.tile_rows, device=self.device)[:, None]
        column = torch.arange(self.tile_rows + self.left + self.right, device=self.device)
        return column - self.left - row

    def _band(self) -> torch.Tensor | None:
        """0 inside the window and -inf outside, for a tile as in `_band_offsets`: [rows,
        columns].
        """
        if self.window is None or self.left + self.right >= 2 * self.length - 1:
            return None
        offset = self._band_offsets()
        outside = (offset < -self.left) | (offset > self.right)
        return torch.zeros(outside.shape, dtype=self.dtype, device=self.device).masked_fill_(
            outside, -torch.inf
        )

    def tiles(self) -> Iterator[_Tile]:
        """The tiles, in an order that lets consecutive ones share keys.

        A tile takes as many heads as its scores leave room for: few where a row of blocks reads
        everything, as BigBird's first and last do, many where it reads little.
        """
        starts_by_step: dict[tuple[int, int], list[int]] = {}
        for start in range(0, self.length, self.tile_rows):
            scores = max(1, self.tile_rows * self._most_columns(start))
            budget = max(1, _TILE_SCORES.get(self.device.type, 2**20) // scores)
            batch_step = 1 if self.device.type == "cpu" else max(1, budget // max(self.heads, 1))
            starts_by_step.setdefault((batch_step, min(self.heads, budget)), []).append(start)
        for (batch_step, head_step), starts in starts_by_step.items():
            for batch in range(0, self.batch, batch_step):
                for head in range(0, self.heads, head_step):
                    for start in starts:
                        end = min(start + self.tile_rows, self.length)
                        first = last = 0
                        if self.window is not None:
                            first = max(0, start - self.left)
                            last = min(self.length, end + self.right)
                        yield _Tile(
                            slice(batch, min(batch + batch_step, self.batch)),
                            slice(head, min(head + head_step, self.heads)),
                            start,
                            end,
                            first,
                            last,
                        )

    def _most_columns(self, start: int) -> int:
        """Keys that the tile of rows from `start` on reads at most, without global ones."""
        columns = 0
        if self.window is not None:
            columns = min(self.tile_rows + max(self.left + self.right, 0), self.length)
        if self.extra is not None:
            block = start // self.extra.query_block_size
            columns += self.entries_per_block[block] * self.extra.key_block_size
        return columns

    def entry_columns(self, tile: _Tile) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For the extra entries of a tile: token positions and used [batch or 1, heads or 1,
        entries * block], and indices into the rows of `_as_blocks` [batch, heads, entries]."""
        assert self.extra is not None
        layout = self.extra
        block = tile.start // layout.query_block_size
        width = self.entries_per_block[block]
        batch = tile.batch if layout.key_blocks.shape[0] > 1 else slice(None)
        heads = tile.heads if layout.key_blocks.shape[1] > 1 else slice(None)
        ids = layout.key_blocks[batch, heads, block, :width].long()
        used = torch.arange(width, device=ids.device) < layout.counts[batch, heads, block, None]
        ids = ids.where(used, 0)
        token = torch.arange(layout.key_block_size, device=ids.device)
        positions = (ids[..., None] * layout.key_block_size + token).flatten(-2)
        batch_index = torch.arange(self.batch, device=ids.device)[tile.batch, None, None]
        head_index = torch.arange(self.heads, device=ids.device)[tile.heads, None]
        flat = (batch_index * self.heads + head_index) * layout.num_key_blocks + ids
        return positions, used.repeat_interleave(layout.key_block_size, dim=-1), flat

    def gather(
        self,
        tile: _Tile,
        source: torch.Tensor,
        blocks: torch.Tensor,
        entry_index: torch.Tensor | None,
    ):
        """The keys or values of a tile's columns: [batch, heads, columns, head_dim]."""
        pieces = (
            [source[tile.batch, tile.heads, tile.first : tile.last]]
            if self.window is not None
            else []
        )
        if self.positions is not None:
            index = self.safe_positions[tile.batch, None, :, None]
            rows = source[tile.batch, tile.heads]
            pieces.append(rows.gather(2, index.expand(*rows.shape[:2], -1, rows.shape[3])))
        if entry_index is not None:
            gathered = blocks.index_select(0, entry_index.flatten())
            pieces.append(gathered.view(*entry_index.shape[:2], -1, self.head_dim))
        joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
        return joined.to(self.matmul_dtype)

    def window_bias(self, tile: _Tile) -> torch.Tensor | None:
        """What is added to the scores of the window's columns."""
        bias = None
        if self.band is not None:
            offset = tile.first - (tile.start - self.left)
            bias = self.band[: tile.end - tile.start, offset : offset + tile.last - tile.first]
        if self.span_length is not None:
            _, log_weight = self.span_weight(tile)
            bias = log_weight if bias is None else bias + log_weight
        if self.near_valid is not None and self._touches_invalid(tile):
            invalid = ~self.near_valid[tile.batch, None, None, tile.first : tile.last]
            closed = torch.zeros(invalid.shape, dtype=self.dtype, device=self.device).masked_fill_(
                invalid, -torch.inf
            )
            bias = closed if bias is None else bias + closed
        return bias

    def span_weight(self, tile: _Tile) -> tuple[torch.Tensor, torch.Tensor]:
        """The adaptive span's weight and its logarithm: [heads, rows, columns]."""
        if self.span_tables is None:
            row = torch.arange(tile.start, tile.end, device=self.device)[:, None]
            distance = (torch.arange(tile.first, tile.last, device=self.device) - row).abs()
            return self._span_weight(distance, tile.heads)
        offset = tile.first - (tile.start - self.left)
        columns = slice(offset, offset + tile.last - tile.first)
        weight, log_weight = self.span_tables
        at = (tile.heads, slice(tile.end - tile.start), columns)
        return weight[at], log_weight[at]

    def _span_tables(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The span's weight and its logarithm for a tile as in `_band_offsets`, the same for
        all.
        """
        if self.span_length is None or self.band is None:
            return None
        return self._span_weight(self._band_offsets().abs(), slice(None))

    def _span_weight(
        self, distance: torch.Tensor, heads: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.span_length is not None
        length = self.span_length.detach().to(self.dtype)[heads, None, None]
        weight = (length + self.span_ramp - distance) / self.span_ramp
        return weight, weight.clamp(MIN_WEIGHT, 1.0).log().masked_fill(weight <= 0, -torch.inf)

    def _touches_invalid(self, tile: _Tile) -> bool:
        if self.near_invalid_before is None:
            return True
        before = self.near_invalid_before[tile.batch.start]
        return before[tile.last] > before[tile.first]

    def extra_bias(self, tile: _Tile, positions: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        """What is added to the scores of the extra entries' columns: [batch, heads, rows or 1,
        columns].
        """
        assert self.extra is not None
        open_ = used & (positions < self.length)
        inside = positions.clamp(max=self.length - 1)
        if self.near_valid is not None:
            valid = self.near_valid[tile.batch, None].expand(-1, positions.shape[1], -1)
            open_ = open_ & valid.gather(2, inside.expand(valid.shape[0], -1, -1))
        open_ = open_[:, :, None, :]
        row = torch.arange(tile.start, tile.end, device=self.device)[:, None]
        if self.is_causal:
            open_ = open_ & (inside[:, :, None, :] <= row)
        if not self.all_full:
            open_ = open_ & self._token_mask(tile, inside[:, :, None, :], row)
        bias = torch.zeros(open_.shape, dtype=self.dtype, device=self.device).masked_fill_(
            ~open_, -torch.inf
        )
        if self.entry_bias is not None:
            block = tile.start // self.extra.query_block_size
            batch = tile.batch if self.entry_bias.shape[0] > 1 else slice(None)
            heads = tile.heads if self.entry_bias.shape[1] > 1 else slice(None)
            entry = self.entry_bias[
                batch, heads, block, : positions.shape[-1] // self.extra.key_block_size
            ]
            bias = bias + entry.repeat_interleave(self.extra.key_block_size, dim=-1)[:, :, None, :]
        return bias

    def _token_mask(self, tile: _Tile, column: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """The token masks of the extra entries: outside the window, and inside the pattern where
        the entry says so.
        """
        layout = self.extra
        assert layout is not None
        head = torch.arange(self.heads, device=self.device)[tile.heads, None, None]
        outside = torch.ones((), dtype=torch.bool, device=self.device)
        if layout.window is not None:
            outside = ~layout.window.allowed(row, column, head, self.length)
        if layout.pattern is None:
            return outside
        batch = tile.batch if layout.flags.shape[0] > 1 else slice(None)
        heads = tile.heads if layout.flags.shape[1] > 1 else slice(None)
        block = tile.start // layout.query_block_size
        entries = column.shape[-1] // layout.key_block_size
        is_pattern = (layout.flags[batch, heads, block, :entries] & EntryFlag.PATTERN) != 0
        is_pattern = is_pattern.repeat_interleave(layout.key_block_size, dim=-1)[:, :, None, :]
        return outside & (layout.pattern.allowed(row, column, head, self.length) | ~is_pattern)

    def prepare(self, tile: _Tile) -> "_Prepared | None":
        """Keys, values and biases of a tile; None if it reads nothing."""
        positions = used = entry_index = None
        if (
            self.extra is not None
            and self.entries_per_block[tile.start // self.extra.query_block_size] > 0
        ):
            positions, used, entry_index = self.entry_columns(tile)
        key_blocks = self.key_tiles if self.extra is not None else self.key
        value_blocks = self.value_tiles if self.extra is not None else self.value
        segments: list[tuple[int, torch.Tensor | None]] = []
        if self.window is not None:
            segments.append((tile.last - tile.first, self.window_bias(tile)))
        if self.positions is not None:
            closed = ~self.position_valid[tile.batch, None, None]
            if self.is_causal:
                row = torch.arange(tile.start, tile.end, device=self.device)[:, None]
                closed = closed | (self.safe_positions[tile.batch, None, None] > row)
            bias = torch.zeros(closed.shape, dtype=self.dtype, device=self.device).masked_fill_(
                closed, -torch.inf
            )
            segments.append((self.positions.shape[1], bias))
        if positions is not None and used is not None:
            segments.append((positions.shape[-1], self.extra_bias(tile, positions, used)))
        if not segments:
            return None
        columns = self._column_words(tile, positions) if self.dropout_p > 0 else None
        return _Prepared(
            self.gather(tile, self.key, key_blocks, entry_index),
            self.gather(tile, self.value, value_blocks, entry_index),
            segments,
            columns,
            entry_index,
            positions,
        )

    def _column_words(self, tile: _Tile, positions: torch.Tensor | None) -> torch.Tensor:
        """The dropout words of a tile's columns: [batch or 1, heads or 1, 1, columns]."""
        pieces = (
            [self.column_keys[tile.first : tile.last][None, None]]
            if self.window is not None
            else []
        )
        if self.positions is not None:
            pieces.append(self.column_keys[self.safe_positions[tile.batch, None]])
        if positions is not None:
            pieces.append(self.column_keys[positions.clamp(max=self.length - 1)])
        lead = torch.broadcast_shapes(*(piece.shape[:2] for piece in pieces))
        return torch.cat([piece.expand(*lead, -1) for piece in pieces], dim=-1)[:, :, None, :]

    def scores(self, prepared: "_Prepared", query: torch.Tensor) -> torch.Tensor:
        """Scores with every bias added, of scaled queries: [batch, heads, rows, columns]."""
        scores = (query @ prepared.key.transpose(-1, -2)).to(self.dtype)
        start = 0
        for width, bias in prepared.segments:
            if bias is not None:
                scores[..., start : start + width].add_(bias)
            start += width
        return scores

    def keep(self, tile: _Tile, prepared: "_Prepared") -> torch.Tensor:
        """Which weights of a tile dropout keeps, see `keep_words`."""
        assert prepared.column_words is not None
        return keep_words(self.row_keys[tile.at][..., None], prepared.column_words, self.dropout_p)


def _lists_and_window(call: AttentionCall) -> tuple[BlockLayout | None, SlidingWindow | None]:
    """The lists of blocks, None if the window is all there is, and the window."""
    if call.pattern is not None:
        window, rest = split_window(call.pattern)
        if rest is None:
            return None, window
    layout = call.lists()
    return layout, layout.window


@dataclass
class _Prepared:
    """What one tile reads."""

    key: torch.Tensor
    value: torch.Tensor
    segments: list[tuple[int, torch.Tensor | None]]
    column_words: torch.Tensor | None
    entry_index: torch.Tensor | None
    positions: torch.Tensor | None


def _forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of every row, as an ordinary row."""
    problem = _Problem(call)
    query, scale, dropout_p = call.query, call.scale, call.dropout_p
    output = like_projection(query)
    lse = torch.empty(query.shape[:3], dtype=problem.dtype, device=query.device)
    for tile in problem.tiles():
        prepared = problem.prepare(tile)
        if prepared is None:
            output[tile.at], lse[tile.at] = 0.0, -torch.inf
            continue
        query_tile = (problem.query[tile.at].to(problem.dtype) * scale).to(problem.matmul_dtype)
        weights = problem.scores(prepared, query_tile)
        # A row that sees nothing has a maximum of -inf; the clamp makes its weights 0 instead of
        # NaN.
        row_max = weights.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(problem.dtype).min)
        weights.sub_(row_max).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        lse[tile.at] = (row_max + total.log()).squeeze(-1)
        if dropout_p > 0:
            zero_dropped_(weights, problem.keep(tile, prepared))
            total = total * (1 - dropout_p)
        result = (weights.to(problem.matmul_dtype) @ prepared.value).to(problem.dtype)
        output[tile.at] = result / total.masked_fill_(total == 0, 1.0)
    return output, lse


def _backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of query, key, value, entry_bias and span.length."""
    problem = _Problem(call)
    query, key, value = call.query, call.key, call.value
    scale, dropout_p = call.scale, call.dropout_p
    dtype, matmul_dtype = problem.dtype, problem.matmul_dtype
    grad_query = like_projection(query)
    grad_key, grad_value = (
        like_projection(key, dtype, zero=True),
        like_projection(value, dtype, zero=True),
    )
    grads = _Accumulators(problem, grad_key, grad_value)
    # Rows that see nothing have an LSE of -inf; with inf instead, their weights come out as 0.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    for tile in problem.tiles():
        prepared = problem.prepare(tile)
        if prepared is None:
            grad_query[tile.at] = 0.0
            continue
        query_tile = (problem.query[tile.at].to(dtype) * scale).to(matmul_dtype)
        grad_tile = grad_output[tile.at]
        delta = (grad_tile.to(dtype) * output[tile.at].to(dtype)).sum(dim=-1, keepdim=True)
        delta -= grad_lse[tile.at][..., None]
        grad_tile = (grad_tile / (1 - dropout_p)).to(matmul_dtype)
        weights = problem.scores(prepared, query_tile)
        weights.sub_(lse[tile.at][..., None]).exp_()
        grad_scores = (grad_tile @ prepared.value.transpose(-1, -2)).to(dtype)
        applied = weights
        if dropout_p > 0:
            keep = problem.keep(tile, prepared)
            zero_dropped_(grad_scores, keep)
            applied = zero_dropped_(weights.clone(), keep)
        grad_value_tile = applied.transpose(-1, -2).to(matmul_dtype) @ grad_tile
        grad_scores.sub_(delta).mul_(weights)
        low_grad_scores = grad_scores.to(matmul_dtype)
        grad_query[tile.at] = (low_grad_scores @ prepared.key).to(dtype) * scale
        grad_key_tile = low_grad_scores.transpose(-1, -2) @ query_tile
        grads.add(tile, prepared, grad_key_tile.to(dtype), grad_value_tile.to(dtype))
        if call.entry_bias is not None or call.span is not None:
            grads.add_biases(tile, prepared, grad_scores)
    return grad_query, *grads.finish(call)


class _Accumulators:
    """Gradients of keys, values and biases, summed over the tiles that read them."""

    def __init__(self, problem: _Problem, grad_key: torch.Tensor, grad_value: torch.Tensor) -> None:
        self.problem, self.grad_key, self.grad_value = problem, grad_key, grad_value
        if problem.positions is not None:
            shape = (problem.batch, problem.heads, problem.positions.shape[1], problem.head_dim)
            self.global_key = torch.zeros(shape, dtype=problem.dtype, device=problem.device)
            self.global_value = torch.zeros_like(self.global_key)
        if problem.extra is not None:
            self.block_key = torch.zeros_like(problem.key_tiles, dtype=problem.dtype)
            self.block_value = torch.zeros_like(self.block_key)
        if problem.entry_bias is not None:
            assert problem.extra is not None
            self.entry_bias = torch.zeros(
                problem.batch,
                problem.heads,
                *problem.extra.key_blocks.shape[2:],
                dtype=problem.dtype,
                device=problem.device,
            )
        if problem.span_length is not None:
            self.span = torch.zeros(problem.heads, dtype=problem.dtype, device=problem.device)

    def add(
        self, tile: _Tile, prepared: _Prepared, grad_key: torch.Tensor, grad_value: torch.Tensor
    ) -> None:
        problem, start = self.problem, 0
        if problem.window is not None:
            start = tile.last - tile.first
            self.grad_key[tile.batch, tile.heads, tile.first : tile.last] += grad_key[:, :, :start]
            self.grad_value[tile.batch, tile.heads, tile.first : tile.last] += grad_value[
                :, :, :start
            ]
        if problem.positions is not None:
            end = start + problem.positions.shape[1]
            self.global_key[tile.batch, tile.heads] += grad_key[:, :, start:end]
            self.global_value[tile.batch, tile.heads] += grad_value[:, :, start:end]
            start = end
        if prepared.entry_index is not None:
            index = prepared.entry_index.flatten()
            self.block_key.index_add_(0, index, grad_key[:, :, start:].reshape(index.numel(), -1))
            self.block_value.index_add_(
                0, index, grad_value[:, :, start:].reshape(index.numel(), -1)
            )

    def add_biases(self, tile: _Tile, prepared: _Prepared, grad_scores: torch.Tensor) -> None:
        problem = self.problem
        if problem.span_length is not None and problem.window is not None:
            weight, _ = problem.span_weight(tile)
            slope = (
                (weight * problem.span_ramp)
                .reciprocal()
                .masked_fill((weight < MIN_WEIGHT) | (weight > 1), 0.0)
            )
            in_window = grad_scores[..., : tile.last - tile.first]
            self.span[tile.heads] += (in_window * slope).sum(dim=(0, 2, 3))
        if problem.entry_bias is not None and prepared.positions is not None:
            assert problem.extra is not None
            width = prepared.positions.shape[-1]
            per_key = grad_scores[..., grad_scores.shape[-1] - width :].sum(dim=2)
            per_entry = per_key.unflatten(-1, (-1, problem.extra.key_block_size)).sum(dim=-1)
            block = tile.start // problem.extra.query_block_size
            self.entry_bias[tile.batch, tile.heads, block, : per_entry.shape[-1]] += per_entry

    def finish(self, call: AttentionCall) -> tuple[torch.Tensor | None, ...]:
        """The gradients of key, value, entry_bias and span.length, in the shapes and types of
        these.
        """
        problem = self.problem
        if problem.positions is not None:
            index = problem.safe_positions[:, None, :, None].expand_as(self.global_key)
            valid = problem.position_valid[:, None, :, None]
            self.grad_key.scatter_add_(2, index, self.global_key * valid)
            self.grad_value.scatter_add_(2, index, self.global_value * valid)
        if problem.extra is not None:
            rows = problem.extra.num_key_blocks * problem.extra.key_block_size
            shape = (problem.batch, problem.heads, rows, problem.head_dim)
            self.grad_key += self.block_key.view(shape)[:, :, : problem.length]
            self.grad_value += self.block_value.view(shape)[:, :, : problem.length]
        grad_bias, entry_bias = None, call.entry_bias
        if entry_bias is not None:
            grad_bias = torch.zeros_like(entry_bias, memory_format=torch.contiguous_format)
            if problem.entry_bias is not None:
                order = problem.entry_order.expand_as(self.entry_bias)
                full = self.entry_bias.new_zeros(*self.entry_bias.shape[:3], entry_bias.shape[-1])
                full.scatter_(-1, order, self.entry_bias)
                grad_bias = full.sum_to_size(entry_bias.shape).to(entry_bias.dtype)
        grad_span = None if call.span is None else self.span.to(call.span.length.dtype)
        return (
            self.grad_key.to(call.key.dtype), self.grad_value.to(call.value.dtype), grad_bias,
            grad_span,
        )  # fmt: skip


blocked_attention = define_operator("blocked_attention", _forward, _backward)
