import pytest
import torch

from adaptive_longformer.patterns import (
    Fixed,
    Full,
    GlobalTokens,
    RandomBlocks,
    SlidingWindow,
    Strided,
    pattern_from_code,
    split_window,
)


def allowed(pattern, length, heads=1):
    position = torch.arange(length)
    head = torch.arange(heads)[:, None, None]
    result = pattern.allowed(position[:, None], position, head, length)
    return result.expand(heads, length, length)


def rows(text):
    return torch.tensor([[c == "1" for c in row] for row in text.split()])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (Full(), "1111 1111 1111 1111"),
        (SlidingWindow(1), "1100 1110 0111 0011"),
        (SlidingWindow(0), "1000 0100 0010 0001"),
        (SlidingWindow(2, 0), "1000 1100 1110 0111"),
        (SlidingWindow(0, 1), "1100 0110 0011 0001"),
        (SlidingWindow(1, dilation=2), "1010 0101 1010 0101"),
        (GlobalTokens((1,)), "0100 1111 0100 0100"),
        (GlobalTokens((1, 9)), "0100 1111 0100 0100"),
        (Strided(2), "1110 1111 1111 0111"),
        (Fixed(2, 1), "1101 1101 0111 0111"),
        (SlidingWindow(0) | GlobalTokens((0,)), "1111 1100 1010 1001"),
    ],
    ids=lambda value: getattr(value, "spec", "expected"),
)
def test_pattern_allows_exactly_the_pairs_drawn_by_hand(pattern, expected):
    assert torch.equal(allowed(pattern, 4)[0], rows(expected))


def test_dilation_per_head_gives_each_head_its_own_reach():
    per_head = allowed(SlidingWindow(2, dilation=(1, 3)), 20, heads=2)
    assert torch.equal(per_head[0], allowed(SlidingWindow(2), 20)[0])
    assert torch.equal(per_head[1], allowed(SlidingWindow(2, dilation=3), 20)[0])


def test_random_blocks_are_distinct_reproducible_and_touch_no_global_generator():
    state = torch.get_rng_state()
    pattern = RandomBlocks(3, 16, seed=7)
    chosen = pattern.chosen_blocks(1000)
    assert chosen.shape == (63, 3)
    assert all(len(set(row.tolist())) == 3 for row in chosen)
    assert torch.equal(chosen, RandomBlocks(3, 16, seed=7).chosen_blocks(1000))
    for seed in (8, 7 + 2**12, 7 + 2**20):
        assert not torch.equal(chosen, RandomBlocks(3, 16, seed=seed).chosen_blocks(1000))
    assert torch.equal(state, torch.get_rng_state())
    spread = torch.bincount(RandomBlocks(4, 8).chosen_blocks(8 * 512).flatten(), minlength=512)
    assert spread.max() < 20, "some block is drawn far more often than the mean of 4"


def test_random_blocks_of_a_short_sequence_are_all_of_its_blocks():
    assert allowed(RandomBlocks(5, 16), 40).all()


@pytest.mark.parametrize(
    "pattern",
    [
        Full(),
        SlidingWindow(3, 5),
        SlidingWindow(3, dilation=(1, 2)),
        Strided(7),
        Fixed(8, 2),
        RandomBlocks(2, 32, 5),
        GlobalTokens((0, 4)),
        SlidingWindow(1) | Strided(7) | GlobalTokens((0,)),
    ],
    ids=str,
)
def test_code_reads_back_to_the_same_pattern(pattern):
    assert all(type(number) is int for number in pattern.code)
    again = pattern_from_code(pattern.code)
    assert again == pattern
    assert hash(again) == hash(pattern)


def test_split_window_keeps_the_widest_band_and_leaves_the_rest():
    window, rest = split_window(
        SlidingWindow(2) | SlidingWindow(5) | Strided(9) | GlobalTokens((0,))
    )
    assert window == SlidingWindow(5)
    assert rest == Strided(9)
    assert split_window(SlidingWindow(3, dilation=2)) == (None, SlidingWindow(3, dilation=2))
    window, rest = split_window(SlidingWindow(9, 0) | SlidingWindow(0, 3))
    assert window == SlidingWindow(9, 0)
    assert rest == SlidingWindow(0, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlidingWindow(-1), "left is -1"),
        (lambda: SlidingWindow(1, 2.5), "right is 2.5"),
        (lambda: SlidingWindow(1, dilation=0), "dilation is 0"),
        (lambda: SlidingWindow(1, dilation=()), "dilation is empty"),
        (lambda: Strided(0), "stride is 0"),
        (lambda: Fixed(4, 5), "summary_size is 5, at most stride = 4"),
        (lambda: RandomBlocks(0), "num_blocks is 0"),
        (lambda: GlobalTokens((-1,)), "positions is -1"),
        (lambda: pattern_from_code((5, 1, 1)), "not made of one of"),
        (lambda: pattern_from_code(Strided(7).code[:-1]), "not made of one of"),
    ],
)
def test_bad_arguments_are_named_with_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()
