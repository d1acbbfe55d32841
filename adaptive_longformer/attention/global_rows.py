"""The rows of global queries: few queries, each against every key.

Three ways to the same rows. With the layer's own projections, or with separate ones that are
already applied, it is ordinary attention of G queries. With separate projections that are not
applied (`GlobalProjections`) and G * heads < hidden_size they are absorbed:

    score = q . (W_k x + b_k) = (W_k^T q) . x + q . b_k
    output = W_v (sum p x) + b_v sum p

so that the keys and the values are the hidden states themselves and all tokens are projected not
once. Each way is one operator with a hand-written backward pass: the number of global tokens is
looked up inside (unless `max_global_tokens` gives it), so that torch.compile sees fixed shapes, and
without any global token all gradients are zeros instead of missing.
"""

from collections.abc import Iterator

import torch

from adaptive_longformer.attention.autocast import without_autocast
from adaptive_longformer.attention.call import AttentionCall, GlobalProjections
from adaptive_longformer.attention.cuda_graphs import OUTSIDE_OF_GRAPHS
from adaptive_longformer.attention.dropout import column_keys, keep_words, row_keys, zero_dropped_
from adaptive_longformer.attention.memory_format import like_projection

# Scores of one chunk of global rows; bounds the memory when very many tokens are global.
_MAX_SCORES = 2**24


def limit_global_tokens(global_mask: torch.Tensor, max_global_tokens: int) -> torch.Tensor:
    """Keeps the first `max_global_tokens` global tokens of every sequence; bool [batch, length]."""
    return global_mask & (global_mask.cumsum(dim=1) <= max_global_tokens)


def pack_global_tokens(
    global_mask: torch.Tensor, max_global_tokens: int | None = None
) -> torch.Tensor:
    """Positions of the global tokens, int64 [batch, columns], filled up with `length`.

    Args:
        global_mask: bool [batch, length].
        max_global_tokens: so many columns (or as many as tokens, if these are fewer), where no row
            has more global tokens; None: as many as the row with most of them has, which is read
            back from the device.
    """
    width = max_global_tokens
    if width is None:
        width = int(global_mask.sum(dim=1).max()) if global_mask.numel() else 0
    order = torch.argsort(global_mask.int(), dim=1, descending=True, stable=True)[:, :width]
    return order.where(global_mask.gather(1, order), global_mask.shape[1])


def merge_global_rows(
    output: torch.Tensor, lse: torch.Tensor, call: AttentionCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE of a call with the rows of its global queries replaced by attention to every
    key.
    """
    assert call.global_mask is not None
    options = (
        call.attention_mask,
        call.global_mask,
        call.max_global_tokens,
        call.is_causal,
        call.scale,
        call.dropout_p,
        call.dropout_seed,
    )
    if isinstance(call.global_qkv, GlobalProjections):
        return absorbed_global_rows(output, lse, *call.global_qkv, *options)
    query, key, value = call.global_qkv or (call.query, call.key, call.value)
    return global_rows(output, lse, query, key, value, *options)


class _Rows:
    """The queries at the packed positions and their masks; shared by the operators below."""

    def __init__(
        self,
        batch: int,
        heads: int,
        length: int,
        attention_mask: torch.Tensor | None,
        global_mask: torch.Tensor,
        max_global_tokens: int | None,
        is_causal: bool,
        dropout_p: float,
        dropout_seed: torch.Tensor | None,
    ) -> None:
        self.positions = pack_global_tokens(global_mask, max_global_tokens)  # [batch, G]
        self.valid = self.positions < length
        self.safe_positions = self.positions.clamp(max=max(length - 1, 0))
        self.attention_mask = attention_mask
        self.is_causal = is_causal
        self.dropout_p = dropout_p
        self.count = self.positions.shape[1]
        self.batch, self.heads, self.length = batch, heads, length
        self.batch_index = torch.arange(batch, device=global_mask.device)[:, None]
        if dropout_p > 0:
            assert dropout_seed is not None
            rows = row_keys(dropout_seed, batch, heads, length)
            index = self.safe_positions[:, None].expand(batch, heads, self.count)
            self.row_keys = rows.gather(2, index)[..., None]
            self.column_keys = column_keys(dropout_seed, length)

    def chunks(self) -> Iterator[slice]:
        step = max(1, _MAX_SCORES // max(1, self.batch * self.heads * self.length))
        for start in range(0, self.count, step):
            yield slice(start, min(start + step, self.count))

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[batch, heads, length, width] -> [batch, heads, G, width]; zero in empty slots."""
        index = self.safe_positions[:, None, :, None].expand(
            -1, tensor.shape[1], -1, tensor.shape[3]
        )
        return tensor.gather(2, index).masked_fill(~self.valid[:, None, :, None], 0.0)

    def scatter_(self, target: torch.Tensor, rows: torch.Tensor) -> None:
        """Writes [batch, heads, G, ...] into [batch, heads, length, ...] at the valid positions."""
        # Which slots are valid is known to the device alone. The others write what the first slot
        # does, which is valid if any is; in a row without any they write what is there.
        slot = torch.arange(self.count, device=target.device).where(self.valid, 0)
        position = self.positions.where(self.valid, self.positions[:, :1])
        index = (self.batch_index, slice(None), position.clamp(max=self.length - 1))
        source = rows[self.batch_index, :, slot]  # [batch, G, heads, ...]
        is_used = self.valid[:, :1].view(self.batch, *(1,) * (source.ndim - 1))
        target[index] = torch.where(is_used, source.to(target.dtype), target[index])

    def forward(
        self, query, key, value, chunk: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Probabilities, the same with dropout, and LSE of a chunk of (scaled) queries [batch,
        heads, g, width].
        """
        scores = query @ key.transpose(-1, -2)  # [batch, heads, g, length]
        if self.attention_mask is not None:
            scores.masked_fill_(~self.attention_mask[:, None, None, :], -torch.inf)
        if self.is_causal:
            later = (
                torch.arange(self.length, device=scores.device)
                > self.safe_positions[:, None, chunk, None]
            )
            scores.masked_fill_(later, -torch.inf)
        lse = scores.logsumexp(dim=-1, keepdim=True)
        probabilities = (scores - lse.masked_fill(lse == -torch.inf, 0.0)).exp_()
        return probabilities, self.drop(probabilities, chunk), lse.squeeze(-1)

    def drop(self, tensor: torch.Tensor, chunk: slice) -> torch.Tensor:
        """The tensor [batch, heads, g, length] with dropout applied."""
        if self.dropout_p == 0:
            return tensor
        keep = keep_words(self.row_keys[:, :, chunk], self.column_keys, self.dropout_p)
        return zero_dropped_(tensor / (1 - self.dropout_p), keep)

    def readable(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keys, values or states [batch, ..., length, width] in float32 at least, zero in padding:
        NaN * 0 is NaN.
        """
        tensor = _precise(tensor)
        if self.attention_mask is None:
            return tensor
        padding = ~self.attention_mask[..., None]
        return tensor.masked_fill(padding if tensor.ndim == 3 else padding[:, None], 0.0)


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@torch.library.custom_op(
    "adaptive_longformer::global_rows", mutates_args=(), tags=OUTSIDE_OF_GRAPHS
)
@without_autocast
def global_rows(
    output: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    global_mask: torch.Tensor,
    max_global_tokens: int | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE with the rows of global queries computed from query, key and value.

    Shapes as in `sparse_attention`; global_mask marks no padding.
    """
    batch, heads, length, _ = query.shape
    rows = _Rows(
        batch, heads, length, attention_mask, global_mask, max_global_tokens, is_causal, dropout_p,
        dropout_seed,
    )  # fmt: skip
    output, lse = (
        like_projection(output).copy_(output),
        lse.clone(memory_format=torch.contiguous_format),
    )
    if rows.count == 0:
        return output, lse
    query_rows, key, value = (
        _precise(rows.gather(query)) * scale,
        rows.readable(key),
        rows.readable(value),
    )
    results, sums = [], []
    for chunk in rows.chunks():
        _, dropped_probabilities, chunk_lse = rows.forward(
            query_rows[:, :, chunk], key, value, chunk
        )
        results.append(dropped_probabilities @ value)
        sums.append(chunk_lse)
    rows.scatter_(output, torch.cat(results, dim=2))
    rows.scatter_(lse, torch.cat(sums, dim=2))
    return output, lse


@global_rows.register_fake
def _(output, lse, *_):
    return like_projection(output), lse.new_empty(lse.shape)


@torch.library.custom_op(
    "adaptive_longformer::global_rows_backward", mutates_args=(), tags=OUTSIDE_OF_GRAPHS
)
@without_autocast
def _global_rows_backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    global_mask: torch.Tensor,
    max_global_tokens: int | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, length, _ = query.shape
    rows = _Rows(
        batch, heads, length, attention_mask, global_mask, max_global_tokens, is_causal, dropout_p,
        dropout_seed,
    )  # fmt: skip
    local = _local_gradients(grad_output, grad_lse, global_mask)
    inputs = (query, key, value)
    if rows.count == 0:
        nothing = [like_projection(tensor, zero=True) for tensor in inputs]
        return *local, nothing[0], nothing[1], nothing[2]
    precise = torch.promote_types(query.dtype, torch.float32)
    grads = [like_projection(tensor, precise, zero=True) for tensor in inputs]
    query_rows, exact_key, exact_value = (
        _precise(rows.gather(query)) * scale,
        rows.readable(key),
        rows.readable(value),
    )
    grad_rows = _precise(rows.gather(grad_output))
    grad_lse_rows = _precise(rows.gather(grad_lse[..., None]))
    grad_query_rows = []
    for chunk in rows.chunks():
        probabilities, dropped_probabilities, _ = rows.forward(
            query_rows[:, :, chunk], exact_key, exact_value, chunk
        )
        grad = grad_rows[:, :, chunk]
        grads[2] += dropped_probabilities.transpose(-1, -2) @ grad
        grad_scores = _softmax_backward(
            probabilities,
            rows.drop(grad @ exact_value.transpose(-1, -2), chunk),
            grad_lse_rows[:, :, chunk],
        )
        grad_query_rows.append(grad_scores @ exact_key * scale)
        grads[1] += grad_scores.transpose(-1, -2) @ query_rows[:, :, chunk]
    rows.scatter_(grads[0], torch.cat(grad_query_rows, dim=2))
    grads = [grad.to(query.dtype) for grad in grads]
    return *local, grads[0], grads[1], grads[2]


def _local_gradients(
    grad_output: torch.Tensor, grad_lse: torch.Tensor, global_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What reaches the rows of ordinary queries."""
    local = like_projection(grad_output).copy_(grad_output)
    local.masked_fill_(global_mask[:, None, :, None], 0.0)
    return local, grad_lse.masked_fill(global_mask[:, None], 0.0).contiguous()


def _softmax_backward(probabilities, grad_probabilities, grad_lse) -> torch.Tensor:
    """Gradient of the scores from those of the probabilities and of the LSE [..., 1]."""
    inner = (probabilities * grad_probabilities).sum(dim=-1, keepdim=True)
    return probabilities * (grad_probabilities - inner + grad_lse)


@_global_rows_backward.register_fake
def _(grad_output, grad_lse, query, key, value, *_):
    local = like_projection(grad_output), grad_lse.new_empty(grad_lse.shape)
    return *local, *(like_projection(tensor) for tensor in (query, key, value))


def _setup_context(ctx, inputs, output) -> None:
    tensors = [value for value in inputs[2:] if isinstance(value, torch.Tensor)]
    ctx.is_tensor = [isinstance(value, torch.Tensor) for value in inputs[2:]]
    ctx.plain = [value for value in inputs[2:] if not isinstance(value, torch.Tensor)]
    ctx.save_for_backward(*tensors)


def _saved_inputs(ctx) -> list:
    tensors, plain = iter(ctx.saved_tensors), iter(ctx.plain)
    return [next(tensors) if is_tensor else next(plain) for is_tensor in ctx.is_tensor]


def _backward(ctx, grad_output, grad_lse):
    grads = _global_rows_backward(grad_output, grad_lse, *_saved_inputs(ctx))
    return *grads, *(None,) * 7


global_rows.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op(
    "adaptive_longformer::absorbed_global_rows", mutates_args=(), tags=OUTSIDE_OF_GRAPHS
)
@without_autocast
def absorbed_global_rows(
    output: torch.Tensor,
    lse: torch.Tensor,
    hidden_states: torch.Tensor,
    query_weight: torch.Tensor,
    query_bias: torch.Tensor | None,
    key_weight: torch.Tensor,
    key_bias: torch.Tensor | None,
    value_weight: torch.Tensor,
    value_bias: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    global_mask: torch.Tensor,
    max_global_tokens: int | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE with the rows of global queries computed from the hidden states.

    Shapes as in `GlobalProjections` and `sparse_attention`; global_mask marks no padding.
    """
    batch, heads, length, _ = output.shape
    rows = _Rows(
        batch, heads, length, attention_mask, global_mask, max_global_tokens, is_causal, dropout_p,
        dropout_seed,
    )  # fmt: skip
    output, lse = (
        like_projection(output).copy_(output),
        lse.clone(memory_format=torch.contiguous_format),
    )
    if rows.count == 0:
        return output, lse
    layer = _AbsorbedLayer(
        rows,
        hidden_states,
        query_weight,
        query_bias,
        key_weight,
        key_bias,
        value_weight,
        value_bias,
        scale,
    )
    results, sums = [], []
    for chunk in rows.chunks():
        _, dropped_probabilities, chunk_lse = rows.forward(
            layer.query[:, :, chunk], layer.key, layer.value, chunk
        )
        results.append(layer.read(dropped_probabilities))
        sums.append(chunk_lse + layer.score_offset[:, :, chunk])
    rows.scatter_(output, torch.cat(results, dim=2))
    rows.scatter_(lse, torch.cat(sums, dim=2))
    return output, lse


@absorbed_global_rows.register_fake
def _(output, lse, *_):
    return like_projection(output), lse.new_empty(lse.shape)


class _AbsorbedLayer:
    """Queries, keys and values of global rows; the keys are the hidden states while that is
    cheaper.
    """

    def __init__(
        self,
        rows: _Rows,
        hidden_states,
        query_weight,
        query_bias,
        key_weight,
        key_bias,
        value_weight,
        value_bias,
        scale,
    ) -> None:
        self.rows, self.scale = rows, scale
        self.states = rows.readable(hidden_states)  # [batch, length, hidden_size]
        self.is_absorbed = rows.count * rows.heads < self.states.shape[-1]

        def by_head(weight, bias) -> tuple[torch.Tensor, torch.Tensor]:
            weight = _precise(weight).unflatten(
                0, (rows.heads, -1)
            )  # [heads, head_dim, hidden_size]
            if bias is None:
                return weight, weight.new_zeros(weight.shape[:2])
            return weight, _precise(bias).unflatten(0, (rows.heads, -1))  # [heads, head_dim]

        self.query_weight, self.query_bias = by_head(query_weight, query_bias)
        self.key_weight, self.key_bias = by_head(key_weight, key_bias)
        self.value_weight, self.value_bias = by_head(value_weight, value_bias)
        # [batch, G, hidden_size]
        self.row_states = self.states[rows.batch_index, rows.safe_positions]
        projected = self._project(self.row_states, self.query_weight, self.query_bias)
        self.projected_query = projected * scale  # [batch, heads, G, head_dim]
        if self.is_absorbed:
            self.query = self.projected_query @ self.key_weight  # [batch, heads, G, hidden_size]
            self.key = self.value = self.states[:, None]
            self.score_offset = (self.projected_query * self.key_bias[:, None]).sum(dim=-1)
        else:
            self.query = self.projected_query
            self.score_offset = self.query.new_zeros(()).expand(self.query.shape[:3])
            self.key = self._project(self.states, self.key_weight, self.key_bias)
            self.value = self._project(self.states, self.value_weight, self.value_bias)

    @staticmethod
    def _project(states, weight, bias) -> torch.Tensor:
        """[batch, n, hidden_size] -> [batch, heads, n, head_dim]"""
        projected = torch.nn.functional.linear(states, weight.flatten(0, 1), bias.flatten())
        return projected.unflatten(-1, weight.shape[:2]).transpose(1, 2)

    def read(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Output rows [batch, heads, g, head_dim] of probabilities (with dropout)."""
        context = probabilities @ self.value
        if not self.is_absorbed:
            return context
        mass = probabilities.sum(dim=-1, keepdim=True)
        return context @ self.value_weight.transpose(-1, -2) + mass * self.value_bias[:, None]

    def backward(self, grad_rows: torch.Tensor, grad_lse_rows: torch.Tensor) -> list[torch.Tensor]:
        """Gradients of hidden_states and of the six parameters."""
        grad_states = torch.zeros_like(self.states)
        grad_projected = torch.zeros_like(self.projected_query)
        grad_key_weight, grad_key_bias = map(torch.zeros_like, (self.key_weight, self.key_bias))
        grad_value_weight, grad_value_bias = map(
            torch.zeros_like, (self.value_weight, self.value_bias)
        )
        grad_key, grad_value = torch.zeros_like(self.key), torch.zeros_like(self.value)
        for chunk in self.rows.chunks():
            query, projected = self.query[:, :, chunk], self.projected_query[:, :, chunk]
            grad = grad_rows[:, :, chunk]
            probabilities, with_dropout, _ = self.rows.forward(query, self.key, self.value, chunk)
            if self.is_absorbed:
                mass = with_dropout.sum(dim=-1, keepdim=True)
                context = with_dropout @ self.value
                grad_value_weight += torch.einsum("bhgd,bhge->hde", grad, context)
                grad_value_bias += (grad * mass).sum(dim=(0, 2))
                grad_context = grad @ self.value_weight  # [batch, heads, g, hidden_size]
                grad_probabilities = grad_context @ self.value.transpose(-1, -2)
                grad_probabilities += (grad * self.value_bias[:, None]).sum(dim=-1, keepdim=True)
                grad_states += torch.einsum("bhgn,bhge->bne", with_dropout, grad_context)
            else:
                grad_probabilities = grad @ self.value.transpose(-1, -2)
                grad_value += with_dropout.transpose(-1, -2) @ grad
            grad_scores = _softmax_backward(
                probabilities,
                self.rows.drop(grad_probabilities, chunk),
                grad_lse_rows[:, :, chunk],
            )
            grad_query = grad_scores @ self.key
            if self.is_absorbed:
                # The sum over keys is zero but for a gradient of the LSE.
                offset = grad_scores.sum(dim=-1, keepdim=True)
                grad_projected[:, :, chunk] = (
                    grad_query @ self.key_weight.transpose(-1, -2) + offset * self.key_bias[:, None]
                )
                grad_key_weight += torch.einsum("bhgd,bhge->hde", projected, grad_query)
                grad_key_bias += (offset * projected).sum(dim=(0, 2))
                grad_states += torch.einsum("bhgn,bhge->bne", grad_scores, query)
            else:
                grad_projected[:, :, chunk] = grad_query
                grad_key += grad_scores.transpose(-1, -2) @ query
        if not self.is_absorbed:
            grad_states += self._project_backward(
                grad_key, self.states, self.key_weight, grad_key_weight, grad_key_bias
            )
            grad_states += self._project_backward(
                grad_value, self.states, self.value_weight, grad_value_weight, grad_value_bias
            )
        grad_query_weight, grad_query_bias = map(
            torch.zeros_like, (self.query_weight, self.query_bias)
        )
        grad_row_states = self._project_backward(
            grad_projected * self.scale,
            self.row_states,
            self.query_weight,
            grad_query_weight,
            grad_query_bias,
        )
        index = self.rows.safe_positions[..., None].expand_as(grad_row_states)
        grad_states.scatter_add_(1, index, grad_row_states * self.rows.valid[..., None])
        return [
            grad_states,
            grad_query_weight,
            grad_query_bias,
            grad_key_weight,
            grad_key_bias,
            grad_value_weight,
            grad_value_bias,
        ]

    @staticmethod
    def _project_backward(grad, states, weight, grad_weight, grad_bias) -> torch.Tensor:
        """Adds to the parameters' gradients in place; returns that of the states."""
        grad_weight += torch.einsum("bhnd,bne->hde", grad, states)
        grad_bias += grad.sum(dim=(0, 2))
        return grad.transpose(1, 2).flatten(2) @ weight.flatten(0, 1)


@torch.library.custom_op(
    "adaptive_longformer::absorbed_global_rows_backward", mutates_args=(), tags=OUTSIDE_OF_GRAPHS
)
@without_autocast
def _absorbed_global_rows_backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor,
    hidden_states: torch.Tensor,
    query_weight: torch.Tensor,
    query_bias: torch.Tensor | None,
    key_weight: torch.Tensor,
    key_bias: torch.Tensor | None,
    value_weight: torch.Tensor,
    value_bias: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    global_mask: torch.Tensor,
    max_global_tokens: int | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
) -> list[torch.Tensor]:
    batch, heads, length, _ = grad_output.shape
    rows = _Rows(
        batch, heads, length, attention_mask, global_mask, max_global_tokens, is_causal, dropout_p,
        dropout_seed,
    )  # fmt: skip
    inputs = (
        hidden_states,
        query_weight,
        query_bias,
        key_weight,
        key_bias,
        value_weight,
        value_bias,
    )
    local = _local_gradients(grad_output, grad_lse, global_mask)
    if rows.count == 0:
        return [*local] + [
            torch.zeros_like(tensor, memory_format=torch.contiguous_format)
            for tensor in inputs
            if tensor is not None
        ]
    layer = _AbsorbedLayer(rows, *inputs, scale)
    grads = layer.backward(
        _precise(rows.gather(grad_output)), _precise(rows.gather(grad_lse[..., None]))
    )
    return [*local] + [
        grad.reshape(tensor.shape).to(tensor.dtype).contiguous()
        for grad, tensor in zip(grads, inputs, strict=True)
        if tensor is not None
    ]


@_absorbed_global_rows_backward.register_fake
def _(grad_output, grad_lse, *inputs):
    local = [like_projection(grad_output), grad_lse.new_empty(grad_lse.shape)]
    return local + [tensor.new_empty(tensor.shape) for tensor in inputs[:7] if tensor is not None]


def _absorbed_backward(ctx, grad_output, grad_lse):
    inputs = _saved_inputs(ctx)
    grads = iter(_absorbed_global_rows_backward(grad_output, grad_lse, *inputs))
    local = (next(grads), next(grads))
    return *local, *(None if tensor is None else next(grads) for tensor in inputs[:7]), *(None,) * 7


absorbed_global_rows.register_autograd(_absorbed_backward, setup_context=_setup_context)
