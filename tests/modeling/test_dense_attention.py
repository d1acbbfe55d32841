import pytest
import torch

from adaptive_longformer.modeling.dense_attention import dense_attention


def made(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("is_bool", [True, False])
def test_output_is_the_probabilities_times_the_values_and_zero_for_an_empty_row(is_bool):
    query, key, value = made(2, 3, 4, 5), made(2, 3, 7, 5), made(2, 3, 7, 5)
    mask = torch.rand(2, 1, 4, 7) < 0.5
    mask[..., 0] = True
    mask[1, :, 2] = False
    given = mask if is_bool else torch.zeros(mask.shape).double().masked_fill(~mask, -torch.inf)
    output, probabilities = dense_attention(
        query, key, value, given, scale=0.3, output_attentions=True
    )
    torch.testing.assert_close(output, probabilities @ value)
    assert (probabilities[~mask.expand_as(probabilities)] == 0).all()
    scores = (query @ key.mT * 0.3).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(probabilities, scores.softmax(dim=-1).nan_to_num(0.0))
    assert (output[1, :, 2] == 0).all()


def test_without_a_mask_everything_is_seen_and_no_probabilities_are_made():
    query, key, value = made(1, 2, 3, 4), made(1, 2, 5, 4), made(1, 2, 5, 4)
    output, probabilities = dense_attention(query, key, value, None, scale=0.5)
    assert probabilities is None
    torch.testing.assert_close(output, (query @ key.mT * 0.5).softmax(dim=-1) @ value)
