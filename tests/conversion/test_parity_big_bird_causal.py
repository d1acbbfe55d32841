import pytest
import torch
from checkpoints import compare, load_converted, make_inputs, models, write_source

from adaptive_longformer.conversion.convert import convert_checkpoint

CAUSAL = dict(is_decoder=True, block_size=16, num_random_blocks=2)
DENSE = (5 + 2 * 2) * 16


@pytest.mark.parametrize("length", [1, 17, DENSE - 1, DENSE])
@pytest.mark.parametrize("attention_type", ["block_sparse", "original_full"])
@pytest.mark.parametrize("padding", ["none", "right"])
def test_logits_equal_where_the_source_is_causal(length, attention_type, padding):
    source, converted = models("big_bird", "ForCausalLM", attention_type=attention_type, **CAUSAL)
    inputs = make_inputs(source.config, "ForCausalLM", length, padding)
    assert compare(source, converted, inputs, valid_only=True) <= 1


def test_a_source_that_reads_everything_is_equal_at_any_length():
    source, converted = models("big_bird", "ForCausalLM", attention_type="original_full", **CAUSAL)
    inputs = make_inputs(source.config, "ForCausalLM", 300, "right")
    assert compare(source, converted, inputs, valid_only=True) <= 1


def test_left_padding_equals_the_source_with_the_positions_of_its_generation():
    source, converted = models("big_bird", "ForCausalLM", **CAUSAL)
    inputs = make_inputs(source.config, "ForCausalLM", 60, "left")
    positions = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    with_positions = dict(inputs, position_ids=positions)
    assert compare(source, converted, with_positions, inputs, valid_only=True) <= 1


def test_blocks_of_the_source_are_not_causal_and_ours_are():
    source, converted = models("big_bird", "ForCausalLM", **CAUSAL)
    inputs = make_inputs(source.config, "ForCausalLM", 300)
    changed = dict(inputs, input_ids=inputs["input_ids"].clone())
    changed["input_ids"][:, 250] = 5 + (changed["input_ids"][:, 250] - 4) % 90
    source.base_model.set_attention_type("block_sparse")
    with torch.no_grad():
        assert not torch.equal(source(**inputs).logits[:, :250], source(**changed).logits[:, :250])
        before, after = converted(**inputs).logits, converted(**changed).logits
    assert torch.equal(before[:, :250], after[:, :250])
    assert not torch.equal(before[:, 250:], after[:, 250:])


@pytest.mark.parametrize("num_beams", [1, 4])
def test_generation_is_that_of_the_source_token_for_token(num_beams):
    source, converted = models("big_bird", "ForCausalLM", **CAUSAL)
    input_ids = make_inputs(source.config, "ForCausalLM", 40)["input_ids"]
    mask = torch.ones_like(input_ids)
    mask[1, :15] = 0
    input_ids[1, :15] = source.config.pad_token_id
    options = dict(attention_mask=mask, max_new_tokens=40, num_beams=num_beams)
    expected = source.generate(input_ids, **options)
    assert expected.shape[1] > 42
    assert torch.equal(converted.generate(input_ids, **options), expected)


def test_it_is_verified_and_the_note_says_up_to_where(tmp_path):
    source = write_source(tmp_path / "source", "big_bird", "ForCausalLM", **CAUSAL)
    report = convert_checkpoint(source, tmp_path / "target", verify=True)
    assert report.architecture == "AdaptiveSparseForCausalLM"
    assert report.max_logit_difference < 1e-4
    assert any(f"above {DENSE} tokens" in note for note in report.notes)
    assert "pipeline_tag: text-generation" in (tmp_path / "target" / "README.md").read_text()
    config = load_converted(tmp_path / "target", "ForCausalLM").config
    assert (config.attention_window, config.num_sink_tokens) == (2 * DENSE, 16)


def test_a_causal_head_without_causal_attention_is_refused(tmp_path):
    source = write_source(tmp_path / "source", "big_bird", "ForCausalLM")
    with pytest.raises(ValueError, match=r"is_decoder = false .* attend to later ones"):
        convert_checkpoint(source, tmp_path / "target")
