import pytest
import torch
from torch.nn import functional as F

from adaptive_longformer.baselines.lsh import hash_buckets, lsh_attention


def draw(length, heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, heads, length, 8, generator=generator, dtype=torch.float64) for _ in "qv"
    ]


def dense(query, value, mask, *, num_hashes, chunk_size, seed):
    """The definition: who meets whom in some hash, then one softmax over all pairs."""
    batch, heads, length, head_dim = query.shape
    chunk_size = min(chunk_size, length)
    clean = query.masked_fill(~mask[:, None, :, None], 0.0)
    buckets = hash_buckets(clean, num_hashes, chunk_size, seed)
    visible = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for row in range(batch):
        for head in range(heads):
            for index in range(num_hashes):
                bucket = [
                    int(b) if m else 10**6 for b, m in zip(buckets[row, head, index], mask[row])
                ]
                order = sorted(range(length), key=lambda token: (bucket[token], token))
                chunk = {token: rank // chunk_size for rank, token in enumerate(order)}
                for i in range(length):
                    for j in range(length):
                        if bucket[i] == bucket[j] and abs(chunk[i] - chunk[j]) <= 1:
                            visible[row, head, i, j] = True
    visible = visible & mask[:, None, None, :] & mask[:, None, :, None]
    scores = clean @ F.normalize(clean, dim=-1).transpose(-1, -2) * head_dim**-0.5
    scores = scores.masked_fill(torch.eye(length, dtype=torch.bool), -1e5)
    scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(dim=-1).nan_to_num(0.0) @ value.masked_fill(~mask[:, None, :, None], 0.0)


@pytest.mark.parametrize("length, chunk_size", [(1, 8), (7, 8), (8, 8), (41, 8), (64, 16)])
@pytest.mark.parametrize("num_hashes", [1, 3])
def test_lsh_attention_equals_its_definition(length, chunk_size, num_hashes):
    query, value = (tensor.requires_grad_() for tensor in draw(length))
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, length - length // 4 :] = False
    options = {"num_hashes": num_hashes, "chunk_size": chunk_size, "seed": 3}
    output = lsh_attention(query, value, attention_mask=mask, **options)
    expected = dense(query, value, mask, **options)
    torch.testing.assert_close(output, expected)
    gradient = torch.randn_like(output)
    actual = torch.autograd.grad(output, (query, value), gradient)
    for ours, theirs in zip(
        actual, torch.autograd.grad(expected, (query, value), gradient), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_more_tokens_make_more_buckets():
    query, _ = draw(64)
    assert hash_buckets(query, 2, 8, seed=0).shape == (2, 2, 2, 64)
    assert int(hash_buckets(query, 2, 8, seed=0).max()) <= 7
    assert int(hash_buckets(query, 2, 32, seed=0).max()) <= 1


def test_the_hash_leaves_the_random_generator_alone():
    query, value = draw(16)
    before = torch.get_rng_state()
    first = lsh_attention(query, value, chunk_size=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(lsh_attention(query, value, chunk_size=4), first)
    assert not torch.equal(lsh_attention(query, value, chunk_size=4, seed=1), first)
