import pytest
import torch

from adaptive_longformer.attention.dropout import column_keys, keep_words, row_keys


def keep_mask(seed, batch, heads, length, dropout_p):
    seed = torch.tensor(seed)
    rows = row_keys(seed, batch, heads, length)[..., None]
    return keep_words(rows, column_keys(seed, length), dropout_p) != 0


@pytest.mark.parametrize("dropout_p", [0.01, 0.1, 0.5, 0.9])
def test_share_of_dropped_pairs_is_p_overall_and_in_every_row_and_column(dropout_p):
    keep = keep_mask(3, 2, 2, 1024, dropout_p).float()
    sigma = (dropout_p * (1 - dropout_p)) ** 0.5
    assert abs(keep.mean() - (1 - dropout_p)) < 5 * sigma / keep.numel() ** 0.5
    for dim in (-1, -2):
        deviation = (keep.mean(dim=dim) - (1 - dropout_p)).abs().max()
        assert deviation < 6 * sigma / 1024**0.5


def test_masks_of_different_rows_columns_heads_and_seeds_are_uncorrelated():
    keep = keep_mask(3, 2, 2, 512, 0.5).float() * 2 - 1
    other = keep_mask(4, 2, 2, 512, 0.5).float() * 2 - 1
    bound = 5 / 512
    assert abs((keep * other).mean()) < bound
    assert abs((keep[0, 0] * keep[0, 1]).mean()) < bound
    assert abs((keep[0, 0] * keep[1, 0]).mean()) < bound
    # Rows against rows, columns against columns: the largest of ~130,000 sample correlations.
    for matrix in (keep[0, 0], keep[0, 0].T):
        correlation = matrix @ matrix.T / 512
        correlation.fill_diagonal_(0)
        assert correlation.abs().max() < 6 / 512**0.5
    # Four corners of rectangles: what a plain xor of a row and a column word would correlate.
    corners = keep[..., :-1, :-1] * keep[..., 1:, :-1] * keep[..., :-1, 1:] * keep[..., 1:, 1:]
    assert abs(corners.mean()) < bound


def test_mask_is_a_pure_function_of_its_coordinates():
    state = torch.get_rng_state()
    small, large = keep_mask(11, 2, 3, 40, 0.3), keep_mask(11, 2, 3, 90, 0.3)
    assert torch.equal(small, large[..., :40, :40])
    assert torch.equal(state, torch.get_rng_state())


def test_words_are_these_numbers_for_ever():
    """Kernels reproduce the hash on their own: a change of these words breaks them."""
    seed = torch.tensor(2**40 + 12345)
    assert row_keys(seed, 1, 2, 3).flatten().tolist() == ROWS
    assert column_keys(seed, 3).tolist() == COLUMNS


ROWS = [-1458261562, 2060047872, 1716000141, 1983326612, -1020785730, 1660490204]
COLUMNS = [-188498127, 1618079329, -259873135]
