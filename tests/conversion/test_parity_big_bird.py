import pytest
import torch
from checkpoints import (
    HEADS,
    TOKEN_HEADS,
    compare,
    grid,
    load_converted,
    make_inputs,
    models,
    source_config,
    write_source,
)

from adaptive_longformer.conversion.convert import convert_checkpoint
from adaptive_longformer.modeling.attention_layer import AdaptiveSparseAttention

LENGTHS = (64, 128, 703, 704, 705, 1024, 2048)
BLOCKS = tuple((size, count) for size in (16, 32, 64) for count in (1, 2, 3))
PADDINGS = ("none", "right", "left")


def sized(length, block, **fields):
    """Fields of a source that reads `length` tokens in blocks."""
    block_size, num_random_blocks = block
    return dict(
        max_position_embeddings=length + 64 - length % 64,
        block_size=block_size,
        num_random_blocks=num_random_blocks,
        **fields,
    )


def check(head, length, padding, **fields):
    if padding == "left" and head not in ("Model", "ForMaskedLM", "ForTokenClassification"):
        # The source pools the padding slot in front, ours the first token that is valid.
        padding = "right"
    source, converted = models("big_bird", head, **fields)
    inputs = make_inputs(source.config, head, length, padding)
    assert compare(source, converted, inputs, valid_only=padding == "left") <= 1
    return source


@pytest.mark.parametrize(
    "head, block, length, padding",
    sorted(grid(head=HEADS, block=BLOCKS, length=LENGTHS, padding=PADDINGS)),
)
def test_logits_equal_those_of_big_bird(head, block, length, padding):
    check(head, length, padding, **sized(2048, block))


@pytest.mark.slow
@pytest.mark.parametrize("head", ["ForMaskedLM", "ForQuestionAnswering"])
def test_logits_equal_those_of_big_bird_at_4096(head):
    check(head, 4096, "right", **sized(4096, (64, 3)))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_the_change_from_dense_to_blocks_is_where_the_source_has_it(block):
    block_size, num_random_blocks = block
    dense = (5 + 2 * num_random_blocks) * block_size
    fields = sized(1024, block)
    lengths = [dense - 1, dense, dense + 1, dense + block_size, dense + block_size + 1]
    for length, padding in zip(lengths, ("left", "none", "right", "none", "left"), strict=True):
        source = check("ForMaskedLM", length, padding, **fields)
        expected = "original_full" if length <= dense else "block_sparse"
        assert source.base_model.attention_type == expected


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("length", [100, 200])
def test_logits_equal_with_every_option_changed(head, length):
    check(
        head,
        length,
        "right",
        rescale_embeddings=True,
        use_bias=False,
        hidden_act="relu",
        type_vocab_size=2,
        layer_norm_eps=1e-3,
        tie_word_embeddings=False,
    )


@pytest.mark.parametrize("length", [100, 200])
def test_a_source_that_reads_everything_is_converted_to_full_attention(length):
    fields = dict(attention_type="original_full")
    source, converted = models("big_bird", "ForMaskedLM", **fields)
    assert converted.config.attention_pattern == "full"
    inputs = make_inputs(source.config, "ForMaskedLM", length, "right")
    assert compare(source, converted, inputs) <= 1


@pytest.mark.parametrize("num_padded", [1, 15, 16, 17, 60])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_of_any_width_is_read_as_the_source_reads_it(num_padded, padding):
    source, converted = models("big_bird", "ForTokenClassification")
    inputs = make_inputs(source.config, "ForTokenClassification", 200)
    padded = slice(0, num_padded) if padding == "left" else slice(200 - num_padded, 200)
    inputs["attention_mask"][:, padded] = 0
    inputs["input_ids"][:, padded] = source.config.pad_token_id
    assert compare(source, converted, inputs) <= 1, "of padded rows too"


@pytest.mark.parametrize("head", TOKEN_HEADS)
def test_embeddings_in_place_of_ids_are_rescaled_too(head):
    source, converted = models("big_bird", head, rescale_embeddings=True)
    inputs = make_inputs(source.config, head, 192)
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = source.get_input_embeddings()(ids).detach()
    inputs.setdefault("token_type_ids", torch.zeros_like(ids))
    assert compare(source, converted, inputs) <= 1


def test_question_without_separator_is_the_first_token():
    source, converted = models("big_bird", "ForQuestionAnswering")
    inputs = make_inputs(source.config, "ForQuestionAnswering", 60)
    inputs["input_ids"][inputs["input_ids"] == source.config.sep_token_id] = 5
    assert compare(source, converted, inputs) <= 1


@pytest.mark.parametrize("given", ["ids", "types", "embeddings"])
@pytest.mark.parametrize("length, padding", [(60, "right"), (200, "none"), (200, "right")])
def test_logits_equal_with_the_callers_question_lengths(given, length, padding):
    source, converted = models("big_bird", "ForQuestionAnswering")
    global_tokens = "some" if given == "types" else "default"  # with token types or without
    inputs = make_inputs(source.config, "ForQuestionAnswering", length, padding, global_tokens)
    if given == "embeddings":
        inputs["inputs_embeds"] = source.get_input_embeddings()(inputs.pop("input_ids")).detach()
    for question_lengths in ([[30], [2]], [[0], [1]], [[length], [5]]):
        asked = {**inputs, "question_lengths": torch.tensor(question_lengths)}
        assert compare(source, converted, asked) <= 1
    assert compare(source, converted, asked, inputs) > 100, "they make a difference"


def test_the_questions_logits_are_ruled_out_but_the_first():
    source, converted = models("big_bird", "ForQuestionAnswering")
    inputs = make_inputs(source.config, "ForQuestionAnswering", 60)
    with torch.no_grad():
        output = converted(**inputs)
    for logits in (output.start_logits, output.end_logits):
        ruled_out = logits < -5e5
        assert ruled_out[0].tolist() == [False] + [True] * 8 + [False] * 51
        assert ruled_out[1].tolist() == [False] + [True] * 3 + [False] * 56


def test_left_padding_leaves_the_first_token_of_the_question_as_no_answer():
    source, converted = models("big_bird", "ForQuestionAnswering")
    inputs = make_inputs(source.config, "ForQuestionAnswering", 60)
    inputs["input_ids"] = inputs["input_ids"].roll(20, dims=1)
    inputs["attention_mask"][:, :20] = 0
    with torch.no_grad():
        logits = converted(**inputs).start_logits
    assert (logits[:, :20] < -5e5).all()
    assert (logits[0] < -5e5).tolist()[20:] == [False] + [True] * 8 + [False] * 31


def test_the_pattern_can_be_switched_at_loading(tmp_path):
    source = write_source(tmp_path / "source", "big_bird", "ForMaskedLM")
    convert_checkpoint(source, tmp_path / "target")
    blocks = load_converted(tmp_path / "target", "ForMaskedLM")
    window = type(blocks).from_pretrained(
        tmp_path / "target", attention_pattern="longformer", default_global_tokens="first"
    )
    window.eval()
    assert window.config.attention_window == (5 + 1) * 16
    original = source_config("big_bird")
    inputs = make_inputs(original, "ForMaskedLM", 300)
    inputs["global_attention_mask"] = torch.zeros_like(inputs["input_ids"])
    inputs["global_attention_mask"][:, 150] = 1
    near = {name: tensor[:, :45] for name, tensor in inputs.items()}
    assert compare(blocks, window, near) <= 1, "what both read in full"
    assert compare(blocks, window, inputs) > 100
    for name, parameter in blocks.named_parameters():
        assert torch.equal(parameter, window.get_parameter(name))


def test_attention_probabilities_are_dense_and_sum_to_1():
    source, converted = models("big_bird", "ForMaskedLM")
    inputs = make_inputs(source.config, "ForMaskedLM", 200, "right")
    with torch.no_grad():
        attentions = converted(**inputs, output_attentions=True).attentions
    layers = [module for module in converted.modules() if type(module) is AdaptiveSparseAttention]
    assert len(attentions) == len(layers)
    for probabilities in attentions:
        assert probabilities.shape == (2, 2, 200, 200)
        torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(2, 2, 200))
        assert not probabilities[:, :, 50, 80:192].any()
        assert (probabilities[0, :, 50, :16] > 0).all()
