"""Attention among tokens that a locality-sensitive hash puts into the same bucket (Reformer)."""

import torch
from torch.nn import functional as F

NUM_HASHES = 2
# Reformer's: a token may read itself only where there is nobody else in its bucket.
_SELF_SCORE = -1e5


def lsh_attention(
    query: torch.Tensor,
    value: torch.Tensor,
    *,
    num_hashes: int = NUM_HASHES,
    chunk_size: int = 64,
    seed: int = 0,
    attention_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention with shared queries and keys, restricted to buckets of a hash.

    A key is its query divided by its length. Tokens are sorted by bucket and then by position, cut
    into chunks, and read their own chunk and its two neighbours as far as these are in the same
    bucket. A token reads the union over the hashes, each key once. Source: Kitaev et al. 2020,
    section 2.

    Args:
        query: [batch, heads, length, head_dim], serves as the key too.
        value: [batch, heads, length, head_dim].
        num_hashes: how many hashes are drawn.
        chunk_size: tokens per chunk; there are about two chunks per bucket's worth of tokens.
        seed: of the hash's rotations, drawn from a generator of their own.
        attention_mask: bool [batch, length], True where a token is not padding; None: all are.
        scale: factor of the scores; 1 / sqrt(head_dim) if not given.

    Returns:
        [batch, heads, length, head_dim]; zeros for padding.

    Note:
        For encoders: where chunks end depends on all tokens, so that a later token would reach
        earlier ones through the sorting even if its key were hidden.
    """
    batch, _, length, head_dim = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    factor = head_dim**-0.5 if scale is None else scale
    queries, values = query.to(dtype), value.to(dtype)
    valid = torch.ones(batch, length, dtype=torch.bool, device=query.device)
    if attention_mask is not None:
        valid = attention_mask
        padding = ~valid[:, None, :, None]
        # A NaN in a padded slot would survive a weight of 0.
        queries, values = queries.masked_fill(padding, 0.0), values.masked_fill(padding, 0.0)
    keys = F.normalize(queries, dim=-1)
    chunk_size = min(chunk_size, length)
    buckets = hash_buckets(queries.detach(), num_hashes, chunk_size, seed)
    # Padding goes behind all buckets.
    behind = torch.iinfo(buckets.dtype).max
    buckets = buckets.masked_fill(~valid[:, None, None, :], behind)
    order = buckets.argsort(dim=-1, stable=True)  # [batch, heads, hash, rank] -> position
    rank = order.argsort(dim=-1)
    chunk = rank // chunk_size  # [batch, heads, hash, position]
    outputs, sums = [], []
    for index in range(num_hashes):
        output, lse = _one_hash(
            queries,
            keys,
            values,
            valid,
            buckets,
            chunk,
            order[:, :, index],
            index,
            chunk_size,
            factor,
        )
        back = rank[:, :, index]
        outputs.append(output.gather(2, back[..., None].expand_as(output)))
        sums.append(lse.gather(2, back))
    weights = torch.stack(sums, dim=-1).softmax(dim=-1)  # [batch, heads, length, hash]
    total = (torch.stack(outputs, dim=-1) * weights[..., None, :]).sum(dim=-1)
    return total.masked_fill(~valid[:, None, :, None], 0.0).to(query.dtype)


def hash_buckets(query: torch.Tensor, num_hashes: int, chunk_size: int, seed: int) -> torch.Tensor:
    """The bucket of every token: the largest of its random projections and their negatives.

    Returns:
        int64 [batch, heads, num_hashes, length].
    """
    _, heads, length, head_dim = query.shape
    half = max(1, length // chunk_size // 2)
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.randn(heads, num_hashes, head_dim, half, generator=generator)
    projected = torch.einsum("bhnd,hrdm->bhrnm", query, rotation.to(query))
    return torch.cat([projected, -projected], dim=-1).argmax(dim=-1)


def _one_hash(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    valid: torch.Tensor,
    buckets: torch.Tensor,
    chunk: torch.Tensor,
    order: torch.Tensor,
    index: int,
    chunk_size: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of one hash, in its sorted order, with keys that several hashes show
    divided among them.
    """
    _, heads, length, _ = queries.shape
    filler = -length % chunk_size
    position = F.pad(order, (0, filler), value=-1).unflatten(2, (-1, chunk_size))
    beyond = torch.full_like(position[:, :, :1], -1)
    before = torch.cat([beyond, position[:, :, :-1]], dim=2)
    after = torch.cat([position[:, :, 1:], beyond], dim=2)
    key_position = torch.cat([position, before, after], dim=-1)
    query_index, key_index = position.clamp(min=0), key_position.clamp(min=0)

    def take(tensor: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Rows of [batch, heads, length, channels] at [batch, heads, chunk, token]."""
        flat = at.flatten(2)[..., None].expand(-1, -1, -1, tensor.shape[-1])
        return tensor.gather(2, flat).unflatten(2, at.shape[2:])

    scores = take(queries, query_index) @ take(keys, key_index).transpose(-1, -2) * scale
    row, column = query_index[..., :, None], key_index[..., None, :]
    visible = (position[..., :, None] >= 0) & (key_position[..., None, :] >= 0)
    expanded = valid[:, None, :, None].expand(-1, heads, -1, 1)
    visible = visible & take(expanded, key_index).transpose(-1, -2)
    # In how many hashes a pair meets: in the same bucket, in the same or in neighbouring chunks.
    meetings = torch.zeros_like(scores)
    for other in range(buckets.shape[2]):
        bucket = buckets[:, :, other, :, None]
        place = chunk[:, :, other, :, None]
        same = take(bucket, query_index) == take(bucket, key_index).transpose(-1, -2)
        distance = take(place, query_index) - take(place, key_index).transpose(-1, -2)
        meets = same & (distance.abs() <= 1)
        meetings += meets
        if other == index:
            visible = visible & meets
    scores = scores.masked_fill(row == column, _SELF_SCORE)
    scores = scores - meetings.clamp(min=1).log()
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(dim=-1)
    is_empty = lse == -torch.inf
    weights = (scores - lse.masked_fill(is_empty, 0.0)[..., None]).exp()
    output = weights @ take(values, key_index)
    lse = lse.masked_fill(is_empty, torch.finfo(lse.dtype).min)
    return output.flatten(2, 3)[:, :, :length], lse.flatten(2, 3)[:, :, :length]
