"""The rows of global queries: few queries, each against every key.

Three ways to the same rows. With the layer's own projections, or with separate ones that are
already applied, it is ordinary attention of G queries. With separate projections that are not
applied (`GlobalProjections`) and G * heads < hidden_size they are absorbed:

    score = q . (W_k x + b_k) = (W_k^T q) . x + q . b_k
    output = W_v (sum p x) + b_v sum p

so that the keys and the values are the hidden states themselves, the same for all heads, and all
tokens are projected not once. With more they are applied to all tokens.

These functions are the inside of operators, where the number of global tokens is known, and nothing
is recorded for autograd. Without any global token all gradients are zeros instead of missing.
"""

from collections.abc import Iterator

import torch

from adaptive_longformer.attention.call import AttentionCall, GlobalProjections
from adaptive_longformer.attention.dropout import column_keys, keep_words, row_keys, zero_dropped_
from adaptive_longformer.attention.memory_format import like_projection

# Scores of one chunk of global rows; bounds the memory when very many tokens are global.
_MAX_SCORES = 2**24
# Separate queries, keys and values, as operators name them.
GLOBAL_TENSORS = ("query_global", "key_global", "value_global")


def write_global_rows(output: torch.Tensor, lse: torch.Tensor, call: AttentionCall) -> None:
    """Writes the rows of global queries over those of the output [batch, heads, length, head_dim]
    and the log-sum-exp [batch, heads, length].
    """
    rows = _rows_of(call)
    if rows is None or rows.count == 0:
        return
    results, sums = rows.forward()
    rows.scatter_(output, results)
    rows.scatter_(lse, sums)


def global_gradients(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor,
    call: AttentionCall,
    others: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The gradients of what global queries read, by the names of the operator's arguments.

    Args:
        grad_output, grad_lse: of all rows.
        call: whose rows they are.
        others: the gradients by the same names that come from ordinary rows, if any do: those of
            query, which are zero in the rows of global queries, key and value. They are changed.
    """
    rows = _rows_of(call)
    if rows is None:
        return {}
    results = {
        name: others[name] if name in others else _zeros_like(tensor)
        for name, tensor in rows.inputs().items()
    }
    if rows.count > 0:
        rows.backward(rows.gather(grad_output), rows.gather(grad_lse[..., None]), results)
    return results


def _zeros_like(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros with the strides that operators promise for the gradient of a tensor."""
    if tensor.ndim == 4:
        return like_projection(tensor, zero=True)
    return torch.zeros_like(tensor, memory_format=torch.contiguous_format)


def _rows_of(call: AttentionCall) -> "_Rows | None":
    if call.global_keys is None:
        return None
    return (_ProjectedRows if isinstance(call.global_qkv, GlobalProjections) else _Rows)(call)


class _Rows:
    """Queries, keys and values that are given: the call's own, or separate ones.

    Attributes:
        positions: of the global tokens, int64 [batch, G], `length` in empty slots.
        query: scaled [batch, heads, G, width].
        key, value: [batch, heads or 1, length, width].
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def __init__(self, call: AttentionCall) -> None:
        assert call.global_keys is not None
        self.call, self.positions = call, call.global_keys.packed()
        self.batch, self.heads, self.length, _ = call.query.shape
        self.count = self.positions.shape[1]
        if self.count == 0:
            return
        self.valid = self.positions < self.length
        self.safe_positions = self.positions.clamp(max=self.length - 1)
        self.batch_index = torch.arange(self.batch, device=self.positions.device)[:, None]
        if call.dropout_p > 0:
            assert call.dropout_seed is not None
            words = row_keys(call.dropout_seed, self.batch, self.heads, self.length)
            index = self.safe_positions[:, None].expand(-1, self.heads, -1)
            self.row_keys = words.gather(2, index)[..., None]
            self.column_keys = column_keys(call.dropout_seed, self.length)
        self.read()

    def read(self) -> None:
        """Sets query, key and value."""
        query, key, value = self.inputs().values()
        self.query = self.gather(query) * self.call.scale
        self.key, self.value = self.readable(key), self.readable(value)

    def inputs(self) -> dict[str, torch.Tensor]:
        """The tensors that the rows are computed from, by their names as operator arguments."""
        call = self.call
        if call.global_qkv is None:
            return {"query": call.query, "key": call.key, "value": call.value}
        assert not isinstance(call.global_qkv, GlobalProjections)
        return dict(zip(GLOBAL_TENSORS, call.global_qkv, strict=True))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output rows [batch, heads, G, head_dim] and log-sum-exp [batch, heads, G]."""
        results, sums = [], []
        for chunk in self.chunks():
            _, dropped, lse = self.probabilities(chunk)
            results.append(self.results(dropped))
            sums.append(lse)
        return torch.cat(results, dim=2), torch.cat(sums, dim=2)

    def results(self, dropped: torch.Tensor) -> torch.Tensor:
        """Output rows of probabilities [batch, heads, g, length], after dropout."""
        return dropped @ self.value

    def backward(
        self, grad_rows: torch.Tensor, grad_lse: torch.Tensor, results: dict[str, torch.Tensor]
    ) -> None:
        """Adds the gradients of `inputs`, by their names, to `results`, in their types.

        Args:
            grad_rows: of the output rows, [batch, heads, G, head_dim].
            grad_lse: of the log-sum-exp, [batch, heads, G, 1].
            results: that of the query is zero at the rows of global queries.
        """
        query, key, value = self.inputs()
        grad_query, grad_key, grad_value = self.gradients(grad_rows, grad_lse)
        self.scatter_(results[query], grad_query * self.call.scale)
        results[key] += grad_key.to(results[key].dtype)
        results[value] += grad_value.to(results[value].dtype)

    def gradients(
        self, grad_rows: torch.Tensor, grad_lse: torch.Tensor, grad_mass: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of query, key and value, in their shapes.

        Args:
            grad_rows: of probabilities @ value, [batch, heads, G, width].
            grad_lse: of the log-sum-exp, [batch, heads, G, 1].
            grad_mass: of the sum of the probabilities after dropout, [batch, heads, G, 1].
        """
        grad_query = []
        grad_key, grad_value = torch.zeros_like(self.key), torch.zeros_like(self.value)
        for chunk in self.chunks():
            probabilities, dropped, _ = self.probabilities(chunk)
            grad = grad_rows[:, :, chunk]
            grad_value += self.over_keys(dropped, grad)
            grad_probabilities = grad @ self.value.mT
            if grad_mass is not None:
                grad_probabilities += grad_mass[:, :, chunk]
            grad_probabilities = self.drop(grad_probabilities, chunk)
            inner = (probabilities * grad_probabilities).sum(dim=-1, keepdim=True)
            grad_scores = probabilities * (grad_probabilities - inner + grad_lse[:, :, chunk])
            grad_query.append(grad_scores @ self.key)
            grad_key += self.over_keys(grad_scores, self.query[:, :, chunk])
            self.collect(dropped, grad_scores)
        return torch.cat(grad_query, dim=2), grad_key, grad_value

    def collect(self, dropped: torch.Tensor, grad_scores: torch.Tensor) -> None:
        """What a subclass needs of each chunk, besides."""

    def over_keys(self, weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Sums of rows [batch, heads, g, width] over the queries, by weights [..., g, length]; over
        the heads too, where these have the keys in common.
        """
        if self.key.shape[1] == 1:
            weights, rows = weights.flatten(1, 2)[:, None], rows.flatten(1, 2)[:, None]
        return weights.mT @ rows

    def chunks(self) -> Iterator[slice]:
        step = max(1, _MAX_SCORES // max(1, self.batch * self.heads * self.length))
        for start in range(0, self.count, step):
            yield slice(start, min(start + step, self.count))

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[batch, heads, length, width] -> [batch, heads, G, width], precise; empty slots are 0."""
        index = self.safe_positions[:, None, :, None]
        index = index.expand(-1, tensor.shape[1], -1, tensor.shape[3])
        return _precise(tensor.gather(2, index).masked_fill(~self.valid[:, None, :, None], 0.0))

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

    def probabilities(self, chunk: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Probabilities [batch, heads, g, length] of a chunk of queries, the same with dropout, and
        log-sum-exp.
        """
        scores = self.query[:, :, chunk] @ self.key.mT
        if self.call.attention_mask is not None:
            scores.masked_fill_(~self.call.attention_mask[:, None, None, :], -torch.inf)
        if self.call.is_causal:
            key_index = torch.arange(self.length, device=scores.device)
            later = key_index > self.safe_positions[:, None, chunk, None]
            scores.masked_fill_(later, -torch.inf)
        lse = scores.logsumexp(dim=-1, keepdim=True)
        probabilities = (scores - lse.masked_fill(lse == -torch.inf, 0.0)).exp_()
        return probabilities, self.drop(probabilities, chunk), lse.squeeze(-1)

    def drop(self, tensor: torch.Tensor, chunk: slice) -> torch.Tensor:
        """The tensor [batch, heads, g, length] with dropout applied."""
        dropout_p = self.call.dropout_p
        if dropout_p == 0:
            return tensor
        keep = keep_words(self.row_keys[:, :, chunk], self.column_keys, dropout_p)
        return zero_dropped_(tensor / (1 - dropout_p), keep)

    def readable(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keys, values or states [batch, ..., length, width], precise, and zero in padding: NaN * 0
        is NaN.
        """
        tensor, mask = _precise(tensor), self.call.attention_mask
        if mask is None:
            return tensor
        padding = ~mask[..., None]
        return tensor.masked_fill(padding if tensor.ndim == 3 else padding[:, None], 0.0)


class _ProjectedRows(_Rows):
    """Queries, keys and values by projections that are applied here, or absorbed while that is
    cheaper.
    """

    def inputs(self) -> dict[str, torch.Tensor]:
        assert isinstance(self.call.global_qkv, GlobalProjections)
        named = self.call.global_qkv._asdict()
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def read(self) -> None:
        given = self.inputs()
        self.states = self.readable(given.pop("hidden_states"))  # [batch, length, hidden_size]
        self.parameters = {name: _precise(tensor) for name, tensor in given.items()}
        self.is_absorbed = self.count * self.heads < self.states.shape[-1]
        self.row_states = self.states[self.batch_index, self.safe_positions]
        # [batch, heads, G, head_dim]
        self.projected = self.project("query", self.row_states) * self.call.scale
        if self.is_absorbed:
            self.query = self.projected @ self.by_head("key_weight")
            self.key = self.value = self.states[:, None]
        else:
            self.query = self.projected
            self.key, self.value = (self.project(name, self.states) for name in ("key", "value"))

    def project(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """[batch, n, hidden_size] -> [batch, heads, n, head_dim]"""
        weight, bias = self.parameters[f"{name}_weight"], self.parameters.get(f"{name}_bias")
        projected = torch.nn.functional.linear(states, weight, bias)
        return projected.view(*states.shape[:2], self.heads, -1).transpose(1, 2)

    def by_head(self, name: str) -> torch.Tensor:
        """A weight as [heads, head_dim, hidden_size], a bias as [heads, 1, head_dim], or 0."""
        if name not in self.parameters:
            return self.states.new_zeros(())
        tensor = self.parameters[name]
        return tensor.reshape(self.heads, *((-1, tensor.shape[1]) if tensor.ndim > 1 else (1, -1)))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        results, lse = super().forward()
        if self.is_absorbed:
            lse = lse + (self.projected * self.by_head("key_bias")).sum(dim=-1)
        return results, lse

    def results(self, dropped: torch.Tensor) -> torch.Tensor:
        context = super().results(dropped)
        if not self.is_absorbed:
            return context
        mass = dropped.sum(dim=-1, keepdim=True)
        return context @ self.by_head("value_weight").mT + mass * self.by_head("value_bias")

    def backward(
        self, grad_rows: torch.Tensor, grad_lse: torch.Tensor, results: dict[str, torch.Tensor]
    ) -> None:
        grads: dict[str, torch.Tensor] = {}
        if self.is_absorbed:
            grad_projected, grad_states = self.absorbed_gradients(grad_rows, grad_lse, grads)
        else:
            grad_projected, grad_key, grad_value = self.gradients(grad_rows, grad_lse)
            grad_states = self.project_backward("key", grad_key, self.states, grads)
            grad_states += self.project_backward("value", grad_value, self.states, grads)
        grad_projected = grad_projected * self.call.scale
        grad_row_states = self.project_backward("query", grad_projected, self.row_states, grads)
        index = self.safe_positions[..., None].expand_as(grad_row_states)
        grad_states.scatter_add_(1, index, grad_row_states * self.valid[..., None])
        grads["hidden_states"] = grad_states
        for name, result in results.items():
            result.copy_(grads[name].view(result.shape))

    def absorbed_gradients(
        self, grad_rows: torch.Tensor, grad_lse: torch.Tensor, grads: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of `projected` and of the states; those of the parameters of key and value
        are put into `grads`.
        """
        self.contexts, self.masses, self.offsets = [], [], []
        grad_mass = (grad_rows * self.by_head("value_bias")).sum(dim=-1, keepdim=True)
        grad_query, grad_key, grad_value = self.gradients(
            grad_rows @ self.by_head("value_weight"), grad_lse, grad_mass
        )
        context, mass, offset = (
            torch.cat(parts, dim=2) for parts in (self.contexts, self.masses, self.offsets)
        )
        grads["key_weight"] = _over_rows(self.projected, grad_query)
        grads["key_bias"] = (offset * self.projected).sum(dim=(0, 2))
        grads["value_weight"] = _over_rows(grad_rows, context)
        grads["value_bias"] = (mass * grad_rows).sum(dim=(0, 2))
        grad_projected = grad_query @ self.by_head("key_weight").mT
        grad_projected += offset * self.by_head("key_bias")
        return grad_projected, grad_key[:, 0].add_(grad_value[:, 0])

    def collect(self, dropped: torch.Tensor, grad_scores: torch.Tensor) -> None:
        if self.is_absorbed:
            self.contexts.append(dropped @ self.value)
            self.masses.append(dropped.sum(dim=-1, keepdim=True))
            # The sum over keys is zero but for a gradient of the log-sum-exp.
            self.offsets.append(grad_scores.sum(dim=-1, keepdim=True))

    def project_backward(
        self, name: str, grad: torch.Tensor, states: torch.Tensor, grads: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The gradient of the states of `project`; those of its parameters are put into `grads`."""
        grad = grad.transpose(1, 2).flatten(2)  # [batch, n, heads * head_dim]
        grads[f"{name}_weight"] = grad.flatten(0, 1).mT @ states.flatten(0, 1)
        grads[f"{name}_bias"] = grad.sum(dim=(0, 1))
        return grad @ self.parameters[f"{name}_weight"]


def _over_rows(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[batch, heads, G, a], [batch, heads, G, b] -> [heads, a, b], summed over batch and G."""
    return left.transpose(0, 1).flatten(1, 2).mT @ right.transpose(0, 1).flatten(1, 2)


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
