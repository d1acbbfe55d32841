import math
from collections import Counter

import pytest
import torch

from adaptive_longformer.patterns import BigBird, big_bird_layout, block_layout, random_draw


def lists_of(layout):
    """The key blocks of every query block, as Python lists."""
    rows = zip(layout.key_blocks[0, 0], layout.counts[0, 0], strict=True)
    return [row[: int(count)].tolist() for row, count in rows]


def draw_of(step, seed=0, layer_idx=0):
    return random_draw(seed, layer_idx, torch.tensor(step))


def random_blocks_of(layout):
    """What the lists name besides the first, the last, the own block and its neighbours."""
    lists = lists_of(layout)
    last = len(lists) - 1
    return [
        sorted(set(blocks) - {0, last, row - 1, row, row + 1})
        for row, blocks in enumerate(lists)
        if 0 < row < last
    ]


def test_layout_by_hand():
    layout = big_bird_layout(BigBird(8, 1), 8 * 8)
    layout.validate()
    every = list(range(8))
    expected = [every, [0, 1, 2, 7], [0, 1, 2, 3, 7], [0, 2, 3, 4, 7]]
    expected += [[0, 3, 4, 5, 7], [0, 4, 5, 6, 7], [0, 5, 6, 7], every]
    assert [sorted(blocks) for blocks in lists_of(layout)] == expected


@pytest.mark.parametrize("num_random_blocks", [1, 2, 3])
def test_the_first_block_counts_for_every_random_one(num_random_blocks):
    layout = big_bird_layout(BigBird(16, num_random_blocks), 12 * 16)
    expected = torch.zeros(12, 12)
    expected[1:-1, 0] = math.log(1 + num_random_blocks)
    found = torch.zeros(12, 12)
    for row, blocks in enumerate(lists_of(layout)):
        found[row, blocks] = layout.bias[0, 0, row, : len(blocks)]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("length", [113, 127, 128, 129, 500, 512])
def test_lists_and_rule_name_the_same_blocks(length):
    layout = big_bird_layout(BigBird(16, 1), length)
    by_rule = block_layout(BigBird(16, 1), length, query_block_size=16, key_block_size=16)
    assert [sorted(blocks) for blocks in lists_of(layout)] == lists_of(by_rule)
    last = (length - 1) // 16
    assert lists_of(layout)[last] == list(range(last + 1)), "a block that is not complete is last"


def test_up_to_the_dense_length_everything_is_seen():
    pattern = BigBird(16, 1)
    assert pattern.dense_length == 7 * 16
    index = torch.arange(7 * 16)
    assert pattern.allowed(index[:, None], index, torch.zeros(1), 7 * 16).all()
    assert not pattern.allowed(index[:, None], index, torch.zeros(1), 7 * 16 + 1).all()
    with pytest.raises(ValueError, match="length is 112, more than 112"):
        big_bird_layout(pattern, 7 * 16)
    big_bird_layout(pattern, 7 * 16 + 1).validate()


@pytest.mark.parametrize("block_size", [4, 256])
def test_a_block_size_that_no_layout_has_is_refused(block_size):
    with pytest.raises(ValueError, match=f"block_size is {block_size}, 8 to 128"):
        BigBird(block_size, 3)


@pytest.mark.parametrize("num_random_blocks", [1, 2, 3])
@pytest.mark.parametrize("spare_blocks", [1, 2, 20])
def test_random_blocks_are_distinct_and_neither_window_nor_global(num_random_blocks, spare_blocks):
    num_blocks = 5 + 2 * num_random_blocks + spare_blocks
    for step in range(20):
        layout = big_bird_layout(BigBird(8, num_random_blocks), num_blocks * 8, draw=draw_of(step))
        layout.validate()
        assert layout.bias is None
        drawn = random_blocks_of(layout)
        assert [len(blocks) for blocks in drawn] == [num_random_blocks] * (num_blocks - 2)


def test_every_free_block_is_drawn_equally_often():
    num_blocks, num_draws, row = 12, 1500, 4
    counted = Counter()
    for step in range(num_draws):
        layout = big_bird_layout(BigBird(8, 3), num_blocks * 8, draw=draw_of(step))
        counted.update(random_blocks_of(layout)[row - 1])
    assert set(counted) == {1, 2, 6, 7, 8, 9, 10}
    share = 3 / 7
    deviation = math.sqrt(num_draws * share * (1 - share))
    for block, count in counted.items():
        assert abs(count - num_draws * share) < 5 * deviation, block


def test_seed_layer_and_step_all_change_the_draw_and_nothing_else_does():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    layout = big_bird_layout(BigBird(8, 3), 100 * 8, draw=draw_of(7))
    torch.manual_seed(1)
    again = big_bird_layout(BigBird(8, 3), 100 * 8, draw=draw_of(7))
    assert lists_of(layout) == lists_of(again)
    for other in (draw_of(8), draw_of(7, seed=1), draw_of(7, layer_idx=1)):
        assert lists_of(layout) != lists_of(big_bird_layout(BigBird(8, 3), 100 * 8, draw=other))
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)
    big_bird_layout(BigBird(8, 3), 100 * 8, draw=draw_of(9))
    assert torch.equal(torch.get_rng_state(), state)


def test_layouts_are_cached_where_nothing_is_drawn():
    assert big_bird_layout(BigBird(), 1000) is big_bird_layout(BigBird(), 1000)
