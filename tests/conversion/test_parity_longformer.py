import pytest
import torch
from checkpoints import HEADS, TOKEN_HEADS, compare, grid, make_inputs, models

LENGTHS = (1, 2, 63, 64, 65, 511, 513, 1000, 4096)
WINDOWS = (32, 64, 512, (32, 128), (512, 64))
PADDINGS = ("none", "right", "left")
GLOBAL_TOKENS = ("default", "none", "some")


def cases():
    combinations = grid(
        head=HEADS,
        length=LENGTHS,
        padding=PADDINGS,
        global_tokens=GLOBAL_TOKENS,
        window=WINDOWS,
    )
    # Sorted so that one pair of models serves neighbours.
    return sorted(combinations, key=lambda case: (case[0], str(case[4]), case[1]))


@pytest.mark.parametrize("head, length, padding, global_tokens, window", cases())
def test_logits_equal_those_of_longformer(head, length, padding, global_tokens, window):
    if padding == "left" and head not in (*TOKEN_HEADS, "Model"):
        # The source pools the padding slot in front, ours the first token that is valid.
        padding = "right"
    source, converted = models("longformer", head, attention_window=window)
    inputs = make_inputs(source.config, head, length, padding, global_tokens)
    assert compare(source, converted, inputs, valid_only=padding == "left") <= 1


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("padding", ["none", "right"])
def test_logits_equal_without_an_attention_mask(head, padding):
    source, converted = models("longformer", head, attention_window=64)
    inputs = make_inputs(source.config, head, 130, padding, "some")
    del inputs["attention_mask"], inputs["token_type_ids"]
    assert compare(source, converted, inputs) <= 1


def test_pooled_heads_read_the_first_valid_token_under_left_padding():
    source, converted = models("longformer", "ForSequenceClassification", attention_window=32)
    left = make_inputs(source.config, "ForSequenceClassification", 90, "left")
    valid = left["attention_mask"][1] == 1
    alone = {name: tensor[1:, valid] for name, tensor in left.items()}
    with torch.no_grad():
        expected = source(**alone).logits[0]
        found = converted(**left).logits[1]
    assert torch.allclose(found, expected, atol=1e-5)
