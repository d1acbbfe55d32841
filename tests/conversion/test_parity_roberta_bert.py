import pytest
from checkpoints import HEADS, TOKEN_HEADS, compare, grid, make_inputs, models

LENGTHS = (1, 2, 17, 63, 64, 65, 257, 511, 512)


@pytest.mark.parametrize("family", ["roberta", "bert"])
@pytest.mark.parametrize(
    "head, length, padding",
    sorted(grid(head=HEADS, length=LENGTHS, padding=("none", "right", "left"))),
)
def test_logits_equal_those_of_the_source(family, head, length, padding):
    if padding == "left" and head not in (*TOKEN_HEADS, "Model"):
        padding = "right"
    source, converted = models(family, head)
    inputs = make_inputs(source.config, head, length, padding)
    assert compare(source, converted, inputs, valid_only=padding == "left") <= 1


@pytest.mark.parametrize("family", ["roberta", "bert"])
@pytest.mark.parametrize("hidden_act", ["relu", "gelu_new"])
@pytest.mark.parametrize("tied", [True, False])
def test_masked_language_logits_follow_activation_and_tying(family, hidden_act, tied):
    source, converted = models(
        family, "ForMaskedLM", hidden_act=hidden_act, tie_word_embeddings=tied
    )
    inputs = make_inputs(source.config, "ForMaskedLM", 70, "right")
    assert compare(source, converted, inputs) <= 1


@pytest.mark.parametrize("family", ["roberta", "bert"])
@pytest.mark.parametrize("length", [1, 33, 512])
def test_a_longer_position_table_leaves_short_inputs_alone(family, length):
    options = (("max_positions", 2048),)
    source, converted = models(family, "ForTokenClassification", options)
    inputs = make_inputs(source.config, "ForTokenClassification", length, "right")
    assert compare(source, converted, inputs) <= 1
    assert converted.config.max_sequence_length == 2048


@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_a_smaller_window_is_equal_up_to_half_of_it(family):
    options = (("attention_window", 64),)
    source, converted = models(family, "ForTokenClassification", options)
    inside = make_inputs(source.config, "ForTokenClassification", 33, "right")
    outside = make_inputs(source.config, "ForTokenClassification", 100, "right")
    assert compare(source, converted, inside) <= 1
    assert compare(source, converted, outside) > 100
