"""What keys of equal places share is taken out of them."""

import pytest
import torch

from adaptive_longformer.patterns import SlidingWindow
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.selection.repeated_positions import TOKENS_PER_PLACE, without_positions
from adaptive_longformer.selection.select_blocks import select_blocks


@pytest.mark.parametrize("length, period", [(200, 64), (65, 64), (203, 50), (30, 7)])
@pytest.mark.parametrize("masked", [False, True])
def test_means_are_those_of_the_tokens_of_a_place(length, period, masked):
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(2, 3, length, 4, generator=generator)
    members = torch.rand(2, length, generator=generator) < 0.7
    members[0, -1], members[1, period:] = True, False  # a row that does not come back to any place
    bad = length // 2
    key[1, 0, bad] = torch.nan
    is_counted = key.isfinite().all(dim=-1, keepdim=True)
    if masked:
        is_counted = is_counted & members[:, None, :, None]
    found = without_positions(key, is_counted, period)
    for batch in range(2):
        for head in range(3):
            for token in range(length):
                is_long = length > period and not (masked and batch == 1)
                same = [
                    other
                    for other in range(length if is_long else 0)
                    if other % period // TOKENS_PER_PLACE == token % period // TOKENS_PER_PLACE
                    and (members[batch, other] or not masked)
                    and (batch, head, other) != (1, 0, bad)
                ]
                mean = key[batch, head, same].mean(dim=0) if same else torch.zeros(4)
                expected = key[batch, head, token] - mean
                actual = found[batch, head, token]
                torch.testing.assert_close(actual, expected, equal_nan=True)
    assert found.isnan().any(dim=-1).sum() == 1


def test_a_choice_goes_by_content_and_not_by_the_row_of_positions():
    """Smooth rows of positions that are larger than the content, which is one of eight topics."""
    generator = torch.Generator().manual_seed(0)
    length, period, size = 1024, 256, 16
    angle = torch.arange(length) % period * (2 * torch.pi / period)
    rows = 6 * torch.stack([angle.cos(), angle.sin(), (2 * angle).cos(), (2 * angle).sin()], dim=1)
    topic = torch.randint(8, (length // size,), generator=generator)
    content = 4 * torch.eye(8)[topic].repeat_interleave(size, dim=0)
    key = torch.cat([rows, content], dim=1)[None, None]
    query = key.clone()
    options, window = SelectionOptions(4, size, size), SlidingWindow(size)

    def shares(key):
        chosen = select_blocks(query, key, window, options).key_blocks[0, 0].long()
        offset = chosen - torch.arange(len(chosen))[:, None]
        same_topic = (topic[chosen] == topic[:, None]).float().mean()
        return same_topic, (offset * size % period == 0).float().mean()

    by_row = shares(key)
    everything = torch.ones(1, 1, length, 1, dtype=torch.bool)
    by_content = shares(without_positions(key, everything, period))
    assert by_row[1] > 0.6 and by_row[0] < 0.5
    assert by_content[1] < 0.3 and by_content[0] > 0.9
