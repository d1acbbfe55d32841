import pytest
import torch

from adaptive_longformer.baselines.oracle_selection import oracle_selection
from adaptive_longformer.baselines.random_selection import random_selection
from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.selection.options import SelectionOptions

WINDOW = SlidingWindow(20)
OPTIONS = SelectionOptions(num_blocks=3, block_size=16, query_block_size=32)


def draw(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, length, 8, generator=generator) for _ in "qk"]


def masks(length):
    attention_mask = torch.ones(2, length, dtype=torch.bool)
    attention_mask[1, length - length // 3 :] = False
    global_mask = torch.zeros(2, length, dtype=torch.bool)
    global_mask[:, [0, 5]] = True
    return {"attention_mask": attention_mask, "global_mask": global_mask}


def may_choose(row, block, batch, length, attention_mask, global_mask):
    """The rule of the selection, one pair of blocks at a time."""
    last = int(attention_mask[batch].nonzero().max())
    queries = [i for i in range(row * 32, row * 32 + 32) if i <= last]
    keys = [j for j in range(block * 16, min(block * 16 + 16, length)) if attention_mask[batch, j]]
    ordinary = [j for j in keys if not global_mask[batch, j]]
    covered = all(abs(i - j) <= 20 for i in queries for j in keys)
    return bool(ordinary) and not covered


@pytest.mark.parametrize("length", [40, 100, 161])
def test_random_blocks_are_distinct_and_allowed(length):
    query, _ = draw(length)
    where = masks(length)
    found = random_selection(query, WINDOW, OPTIONS, **where)
    for batch in range(2):
        last = int(where["attention_mask"][batch].nonzero().max())
        for row in range(last // 32 + 1):
            allowed = {
                block
                for block in range(-(-length // 16))
                if may_choose(row, block, batch, length, **where)
            }
            for head in range(3):
                count = int(found.counts[batch, head, row])
                chosen = found.key_blocks[batch, head, row, :count].tolist()
                assert count == min(3, len(allowed)) and len(set(chosen)) == count
                assert set(chosen) <= allowed


def test_random_blocks_depend_on_seed_and_head_only():
    query, key = draw(400)
    first = random_selection(query, WINDOW, OPTIONS)
    assert torch.equal(random_selection(key, WINDOW, OPTIONS).key_blocks, first.key_blocks)
    assert not torch.equal(first.key_blocks[:, 0], first.key_blocks[:, 1])
    other = random_selection(query, WINDOW, OPTIONS, seed=1)
    assert not torch.equal(other.key_blocks, first.key_blocks)


def test_the_oracle_takes_the_blocks_with_the_most_attention():
    length = 161
    query, key = draw(length)
    where = masks(length)
    found = oracle_selection(query * 3, key, WINDOW, OPTIONS, **where)
    scores = 3 * query @ key.transpose(-1, -2) * 8**-0.5
    scores = scores.masked_fill(~where["attention_mask"][:, None, None, :], -torch.inf)
    weights = scores.softmax(dim=-1)
    voters = where["attention_mask"] & ~where["global_mask"]
    for batch in range(2):
        last = int(where["attention_mask"][batch].nonzero().max())
        for row in range(last // 32 + 1):
            rows = [i for i in range(row * 32, min(row * 32 + 32, length)) if voters[batch, i]]
            for head in range(3):
                mass = {}
                for block in range(-(-length // 16)):
                    columns = [
                        j
                        for j in range(block * 16, min(block * 16 + 16, length))
                        if not where["global_mask"][batch, j]
                    ]
                    if may_choose(row, block, batch, length, **where):
                        tile = weights[batch, head][rows][:, columns]
                        mass[block] = float(tile.sum()) / 32
                expected = sorted(mass, key=lambda block: -mass[block])[:3]
                count = int(found.counts[batch, head, row])
                assert found.key_blocks[batch, head, row, :count].tolist() == expected
                torch.testing.assert_close(
                    found.mass[batch, head, row, :count],
                    torch.tensor([mass[block] for block in expected]),
                )
