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
from adaptive_longformer.attention.padding import are_small

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
    rows.put_(output, results)
    rows.put_(lse[..., None], sums)


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
    if rows.count == 0:
        return rows.gradients_of_others(others)
    return rows.backward(rows.gather(grad_output), rows.gather(grad_lse[..., None]), others)


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
        query: scaled [batch, heads, rows, width], G rows; or where all heads read the same keys
            [batch, 1, rows, width], heads x G rows.
        key, value: [batch, heads or 1, length, width].
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def __init__(self, call: AttentionCall) -> None:
        assert call.global_keys is not None
        self.call, positions = call, call.global_keys.packed()
        self.batch, self.heads, self.length, _ = call.query.shape
        self.count = positions.shape[1]
        if self.count == 0:
            return
        # Which slots are empty is known to the device alone. They stand for a token that is not
        # global, of which there is one where a slot is empty.
        self.is_empty = (positions >= self.length)[:, None, :, None]  # [batch, 1, G, 1]
        spare = call.global_keys.mask.int().argmin(dim=1)[:, None, None, None]
        self.positions = spare.where(self.is_empty, positions[:, None, :, None])
        self.padding = None if call.attention_mask is None else ~call.attention_mask
        self.read()
        if call.dropout_p > 0:
            assert call.dropout_seed is not None
            words = row_keys(call.dropout_seed, self.batch, self.heads, self.length)[..., None]
            self.row_keys = self.as_rows(words.gather(2, self.index_of(words)))
            self.column_keys = column_keys(call.dropout_seed, self.length)

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
        """Output rows [batch, heads, G, head_dim] and log-sum-exp [batch, heads, G, 1]."""
        results, sums = [], []
        for chunk in self.chunks():
            scores, probabilities = self.probabilities(chunk)
            results.append(self.results(self.drop(probabilities, chunk)))
            # The largest weight is 1 before it is divided by the sum.
            largest = probabilities.amax(dim=-1, keepdim=True)
            sums.append(scores.amax(dim=-1, keepdim=True) - largest.log())
        return self.by_head(results), self.by_head(sums)

    def results(self, dropped: torch.Tensor) -> torch.Tensor:
        """What a chunk of rows reads, by probabilities after dropout."""
        return dropped @ self.value

    def gradients_of_others(self, others: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The gradients of `inputs` from ordinary rows, zero of what these do not read."""
        return {
            name: others[name] if name in others else _zeros_like(tensor)
            for name, tensor in self.inputs().items()
        }

    def backward(
        self, grad_rows: torch.Tensor, grad_lse: torch.Tensor, others: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The gradients of `inputs`, by their names and in their types.

        Args:
            grad_rows: of the output rows, [batch, heads, G, head_dim].
            grad_lse: of the log-sum-exp, [batch, heads, G, 1].
            others: as in `global_gradients`.
        """
        results = self.gradients_of_others(others)
        grad_query, grad_key, grad_value = self.gradients(grad_rows, grad_lse)
        of_query, of_key, of_value = results.values()
        self.add_(of_query, grad_query * self.call.scale)
        of_key += grad_key
        of_value += grad_value
        return results

    def gradients(
        self, grad_rows: torch.Tensor, grad_lse: torch.Tensor, grad_mass: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of query [batch, heads, G, width], key and value.

        Args:
            grad_rows: of probabilities @ value, [batch, heads, G, width].
            grad_lse: of the log-sum-exp, [batch, heads, G, 1].
            grad_mass: of the sum of the probabilities after dropout, [batch, heads, G, 1].
        """
        grad_rows, grad_lse = self.as_rows(grad_rows), self.as_rows(grad_lse)
        grad_query: list[torch.Tensor] = []
        grad_key = grad_value = None
        for chunk in self.chunks():
            _, probabilities = self.probabilities(chunk)
            dropped = self.drop(probabilities, chunk)
            grad = grad_rows[:, :, chunk]
            grad_probabilities = grad @ self.value.mT
            if grad_mass is not None:
                grad_probabilities += self.as_rows(grad_mass)[:, :, chunk]
            grad_probabilities = self.drop(grad_probabilities, chunk)
            # Torch's own backward of softmax depends on the number of threads.
            inner = (grad_probabilities * probabilities).sum(dim=-1, keepdim=True)
            grad_scores = probabilities * (grad_probabilities - (inner - grad_lse[:, :, chunk]))
            grad_query.append(grad_scores @ self.key)
            of_key, of_value = grad_scores.mT @ self.query[:, :, chunk], dropped.mT @ grad
            grad_key = of_key if grad_key is None else grad_key.add_(of_key)
            grad_value = of_value if grad_value is None else grad_value.add_(of_value)
            self.collect(dropped)
        assert grad_key is not None and grad_value is not None
        return self.by_head(grad_query), grad_key, grad_value

    def collect(self, dropped: torch.Tensor) -> None:
        """What a subclass needs of each chunk, besides."""

    def chunks(self) -> Iterator[slice]:
        """Parts of the rows."""
        heads, rows = self.query.shape[1:3]
        step = max(1, _MAX_SCORES // max(1, self.batch * heads * self.length))
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))

    def as_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """[batch, heads, G, ...] as the query has its heads and rows."""
        return tensor.reshape(self.batch, -1, self.query.shape[2], tensor.shape[3])

    def by_head(self, chunks: list[torch.Tensor]) -> torch.Tensor:
        """Chunks of rows put together, [batch, heads, G, ...]."""
        rows = chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=2)
        return rows.reshape(self.batch, self.heads, self.count, -1)

    def index_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of a tensor [batch, heads, length, width], as gather and scatter take them."""
        return self.positions.expand(-1, tensor.shape[1], -1, tensor.shape[3])

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[batch, heads, length, width] -> [batch, heads, G, width], precise; empty slots are 0."""
        return _precise(tensor.gather(2, self.index_of(tensor)).masked_fill_(self.is_empty, 0.0))

    def put_(self, target: torch.Tensor, rows: torch.Tensor) -> None:
        """Writes [batch, heads, G, width] into [batch, heads, length, width]."""
        index = self.index_of(target)
        there = target.gather(2, index)
        target.scatter_(2, index, there.where(self.is_empty, rows.to(target.dtype)))

    def add_(self, target: torch.Tensor, rows: torch.Tensor) -> None:
        """Adds [batch, heads, G, width], 0 in empty slots, to [batch, heads, length, width]."""
        target.scatter_add_(2, self.index_of(target), rows.to(target.dtype))

    def probabilities(self, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and probabilities of a chunk of rows, [batch, heads or 1, rows, length]."""
        scores = self.query[:, :, chunk] @ self.key.mT
        # Not -inf, of which an empty slot in a sequence of padding would become NaN.
        hidden = torch.finfo(scores.dtype).min
        if self.padding is not None:
            scores.masked_fill_(self.padding[:, None, None, :], hidden)
        if self.call.is_causal:
            positions = self.as_rows(self.positions.expand(-1, self.heads, -1, -1))
            key_index = torch.arange(self.length, device=scores.device)
            scores.masked_fill_(key_index > positions[:, :, chunk], hidden)
        return scores, scores.softmax(dim=-1)

    def drop(self, tensor: torch.Tensor, chunk: slice) -> torch.Tensor:
        """The tensor [batch, heads or 1, rows, length] with dropout applied."""
        dropout_p = self.call.dropout_p
        if dropout_p == 0:
            return tensor
        keep = keep_words(self.row_keys[:, :, chunk], self.column_keys, dropout_p)
        return zero_dropped_(tensor / (1 - dropout_p), keep)

    def readable(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keys, values or states [batch, ..., length, width], precise, and zero in padding: NaN * 0
        is NaN.
        """
        tensor = _precise(tensor)
        if self.padding is None or are_small(tensor):
            return tensor
        padding = self.padding if tensor.ndim == 3 else self.padding[:, None]
        return tensor.masked_fill(padding[..., None], 0.0)


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
        # [batch, G, hidden_size]
        self.row_states = self.gather(self.states[:, None])[:, 0]
        # [batch, heads, G, head_dim]
        self.projected = self.project("query", self.row_states) * self.call.scale
        if self.is_absorbed:
            query = _by_weight(self.projected, self.of_heads("key_weight"))
            self.query = query.reshape(self.batch, 1, -1, query.shape[-1])
            self.key = self.value = self.states[:, None]
        else:
            self.query = self.projected
            self.key, self.value = (self.project(name, self.states) for name in ("key", "value"))

    def project(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """[batch, n, hidden_size] -> [batch, heads, n, head_dim]"""
        weight, bias = self.parameters[f"{name}_weight"], self.parameters.get(f"{name}_bias")
        projected = torch.nn.functional.linear(states, weight, bias)
        return projected.view(*states.shape[:2], self.heads, -1).transpose(1, 2)

    def of_heads(self, name: str) -> torch.Tensor:
        """A weight as [heads, head_dim, hidden_size], a bias as [heads, 1, head_dim], or 0."""
        if name not in self.parameters:
            return self.states.new_zeros(())
        tensor = self.parameters[name]
        return tensor.reshape(self.heads, *((-1, tensor.shape[1]) if tensor.ndim > 1 else (1, -1)))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.masses: list[torch.Tensor] = []
        results, lse = super().forward()
        if self.is_absorbed:
            results = _by_weight(results, self.of_heads("value_weight").mT)
            results += self.by_head(self.masses) * self.of_heads("value_bias")
            lse = lse + (self.projected * self.of_heads("key_bias")).sum(dim=-1, keepdim=True)
        return results, lse

    def results(self, dropped: torch.Tensor) -> torch.Tensor:
        if self.is_absorbed:
            self.masses.append(dropped.sum(dim=-1, keepdim=True))
        return super().results(dropped)

    def backward(
        self, grad_rows: torch.Tensor, grad_lse: torch.Tensor, others: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        grads: dict[str, torch.Tensor] = {}
        if self.is_absorbed:
            grad_projected, grad_states = self.absorbed_gradients(grad_rows, grad_lse, grads)
        else:
            grad_projected, grad_key, grad_value = self.gradients(grad_rows, grad_lse)
            grad_states = self.project_backward("key", grad_key, self.states, grads)
            grad_states += self.project_backward("value", grad_value, self.states, grads)
        grad_projected = grad_projected * self.call.scale
        grad_row_states = self.project_backward("query", grad_projected, self.row_states, grads)
        self.add_(grad_states[:, None], grad_row_states[:, None])
        grads["hidden_states"] = grad_states
        # None of them is read by ordinary rows.
        return {
            name: grads[name].view(tensor.shape).to(tensor.dtype)
            for name, tensor in self.inputs().items()
        }

    def absorbed_gradients(
        self, grad_rows: torch.Tensor, grad_lse: torch.Tensor, grads: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of `projected` and of the states; those of the parameters of key and value
        are put into `grads`.
        """
        self.contexts, self.masses = [], []
        grad_mass = (grad_rows * self.of_heads("value_bias")).sum(dim=-1, keepdim=True)
        grad_query, grad_key, grad_value = self.gradients(
            _by_weight(grad_rows, self.of_heads("value_weight")), grad_lse, grad_mass
        )
        context, mass = self.by_head(self.contexts), self.by_head(self.masses)
        over_rows = "bhga,bhgc->hac"
        grads["key_weight"] = torch.einsum(over_rows, self.projected, grad_query)
        # The gradients of a row's scores add up to that of its log-sum-exp.
        grads["key_bias"] = (grad_lse * self.projected).sum(dim=(0, 2))
        grads["value_weight"] = torch.einsum(over_rows, grad_rows, context)
        grads["value_bias"] = (mass * grad_rows).sum(dim=(0, 2))
        grad_projected = _by_weight(grad_query, self.of_heads("key_weight").mT)
        grad_projected += grad_lse * self.of_heads("key_bias")
        return grad_projected, grad_key[:, 0].add_(grad_value[:, 0])

    def collect(self, dropped: torch.Tensor) -> None:
        if self.is_absorbed:
            self.contexts.append(self.results(dropped))

    def project_backward(
        self, name: str, grad: torch.Tensor, states: torch.Tensor, grads: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The gradient of the states of `project`; those of its parameters are put into `grads`."""
        grad = grad.transpose(1, 2).flatten(2)  # [batch, n, heads * head_dim]
        grads[f"{name}_weight"] = grad.flatten(0, 1).mT @ states.flatten(0, 1)
        grads[f"{name}_bias"] = grad.sum(dim=(0, 1))
        return grad @ self.parameters[f"{name}_weight"]


def _by_weight(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[batch, heads, G, a], [heads, a, b] -> [batch, heads, G, b], without copies of the weight."""
    return torch.einsum("bhga,hac->bhgc", rows, weight)


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
