"""BigBird's attention in our model: its random blocks in training, and global tokens besides."""

import pytest
import torch

from adaptive_longformer.modeling import attention_layer
from adaptive_longformer.modeling.modeling_adaptive_sparse import (
    AdaptiveSparseForMaskedLM,
    AdaptiveSparseForQuestionAnswering,
    AdaptiveSparseModel,
)
from adaptive_longformer.testing import loss_of, tiny_config, tiny_inputs, tiny_model

# Blocks of 8 tokens: inputs of up to 72 tokens are read in full.
BIG_BIRD = dict(
    attention_pattern="big_bird", block_size=8, num_random_blocks=2, head_style="big_bird"
)


def big_bird(model_class=AdaptiveSparseForMaskedLM, **overrides):
    return tiny_model(model_class, **{**BIG_BIRD, **overrides})


def gradients_of(model, inputs):
    model.zero_grad()
    loss_of(model, inputs).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("length", [72, 73, 200])
@pytest.mark.parametrize("with_global_tokens", [False, True])
def test_any_length_gives_the_same_as_the_dense_definition(length, with_global_tokens):
    model = big_bird()
    inputs = tiny_inputs(model, length)
    if with_global_tokens:
        inputs["global_attention_mask"] = (torch.arange(length) % 40 == 3).long().expand(2, -1)
    with torch.no_grad():
        output = model(**inputs).logits
        model.config.attention_backend = "reference"
        torch.testing.assert_close(output, model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_short_inputs_leave_no_trace():
    model = big_bird()
    long, short = tiny_inputs(model, 200), tiny_inputs(model, 30)
    with torch.no_grad():
        before = model(**long).logits
        model(**short)
        assert torch.equal(model(**long).logits, before)


def test_every_training_step_draws_other_blocks_and_evaluation_none():
    model = big_bird()
    inputs = tiny_inputs(model, 200)
    with torch.no_grad():
        evaluated = model(**inputs).logits
        assert model.model.random_step.count == 0
        model.train()
        first, second = model(**inputs).logits, model(**inputs).logits
        assert model.model.random_step.count == 2
        assert not torch.allclose(first, second, atol=1e-3)
        model.model.random_step.count.zero_()
        assert torch.equal(model(**inputs).logits, first)
        assert torch.equal(model.eval()(**inputs).logits, evaluated)
        assert model.model.random_step.count == 1


def test_every_layer_draws_its_own_blocks_from_the_seed(monkeypatch):
    drawn = []

    def spy(*args, **kwargs):
        layout = attention_layer_layout(*args, **kwargs)
        drawn.append(layout.key_blocks)
        return layout

    attention_layer_layout = attention_layer.big_bird_layout
    monkeypatch.setattr(attention_layer, "big_bird_layout", spy)
    for seed in (0, 0, 1):
        model = big_bird(attention_seed=seed).train()
        model(**tiny_inputs(model, 200))
    first, second, first_again, second_again, other_first, _ = drawn
    assert not torch.equal(first, second)
    assert torch.equal(first, first_again)
    assert torch.equal(second, second_again)
    assert not torch.equal(first, other_first)


def test_training_touches_no_global_random_generator():
    model = big_bird().train()
    state = torch.get_rng_state()
    model(**tiny_inputs(model, 200))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_recomputes_the_same_blocks(use_reentrant):
    inputs = tiny_inputs(big_bird(), 200, with_labels=True)
    model = big_bird().train()
    model.model.random_step.count.fill_(5)
    expected = gradients_of(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.model.random_step.count.fill_(5)
    found = gradients_of(model, inputs)
    assert model.model.random_step.count == 6
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    model.model.random_step.count.fill_(6)
    others = gradients_of(model, inputs)
    assert any(not torch.allclose(others[name], expected[name], atol=1e-4) for name in expected)


def test_the_training_step_is_saved_and_a_checkpoint_without_it_starts_at_0(tmp_path):
    model = big_bird().train()
    model(**tiny_inputs(model, 100))
    model.save_pretrained(tmp_path / "with")
    loaded, info = AdaptiveSparseForMaskedLM.from_pretrained(
        tmp_path / "with", output_loading_info=True
    )
    assert loaded.model.random_step.count == 1
    tiny_model(AdaptiveSparseForMaskedLM, head_style="big_bird").save_pretrained(tmp_path / "none")
    loaded, info = AdaptiveSparseForMaskedLM.from_pretrained(
        tmp_path / "none", **BIG_BIRD, output_loading_info=True
    )
    assert loaded.model.random_step.count == 0
    assert not info["missing_keys"]


def test_weights_of_another_pattern_load_strictly_in_both_directions():
    big_birds = big_bird().train(), big_bird()
    other = tiny_model(AdaptiveSparseForMaskedLM, head_style="big_bird", attention_pattern="full")
    big_birds[0](**tiny_inputs(big_birds[0], 100))
    other.load_state_dict(big_birds[0].state_dict(), strict=True)
    big_birds[1].load_state_dict(other.state_dict(), strict=True)
    assert big_birds[1].model.random_step.count == 0
    big_birds[1].load_state_dict(big_birds[0].state_dict(), strict=True)
    assert big_birds[1].model.random_step.count == 1


def test_a_device_map_may_split_the_model(tmp_path):
    model = big_bird(num_hidden_layers=8)
    model.save_pretrained(tmp_path)
    room = {"cpu": int(0.8 * model.get_memory_footprint())}
    split = AdaptiveSparseForMaskedLM.from_pretrained(
        tmp_path, device_map="auto", max_memory=room, offload_folder=tmp_path / "disk"
    )
    assert set(split.hf_device_map.values()) == {"cpu", "disk"}
    inputs = tiny_inputs(model, 100)
    with torch.no_grad():
        assert torch.equal(split(**inputs).logits, model(**inputs).logits)


def test_global_tokens_of_the_caller_see_and_are_seen_besides_the_blocks():
    model = big_bird(num_hidden_layers=1)
    inputs = tiny_inputs(model, 200, padding="none")
    mask = torch.zeros_like(inputs["input_ids"])
    mask[:, 100] = 1
    changed = dict(inputs, input_ids=inputs["input_ids"].clone())
    changed["input_ids"][:, 100] = (changed["input_ids"][:, 100] + 1) % 97
    far = torch.arange(200)
    far = (far >= 8) & (far < 192) & ((far // 8 - 100 // 8).abs() > 1)
    with torch.no_grad():
        without = [model(**batch).logits for batch in (inputs, changed)]
        with_mask = [
            model(**batch, global_attention_mask=mask).logits for batch in (inputs, changed)
        ]
        elsewhere = dict(inputs, input_ids=inputs["input_ids"].clone())
        elsewhere["input_ids"][:, 40] = (elsewhere["input_ids"][:, 40] + 1) % 97
        sees = model(**elsewhere, global_attention_mask=mask).logits
        blind = model(**elsewhere).logits
    assert torch.equal(without[0][:, far], without[1][:, far])
    assert ((with_mask[0] - with_mask[1])[:, far].abs().amax(dim=-1) > 0).all()
    assert (sees[:, 100] != with_mask[0][:, 100]).any()
    assert torch.equal(blind[:, 100], without[0][:, 100])


def test_nothing_is_global_by_default_but_the_blocks():
    model = big_bird(AdaptiveSparseForQuestionAnswering)
    inputs = tiny_inputs(model, 200)
    zeros = torch.zeros_like(inputs["input_ids"])
    with torch.no_grad():
        found, expected = model(**inputs), model(**inputs, global_attention_mask=zeros)
    assert torch.equal(found.start_logits, expected.start_logits)


@pytest.mark.parametrize("training", [False, True])
def test_it_compiles_without_graph_breaks(training):
    torch.compiler.reset()
    model = big_bird(AdaptiveSparseModel).train(training)
    inputs = tiny_inputs(model, 100)
    expected = model(**inputs).last_hidden_state
    if training:
        model.random_step.count.zero_()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(**inputs).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert model.random_step.count == int(training)
    loss_of(compiled, inputs).backward()


def test_a_block_size_that_no_layout_has_is_refused():
    with pytest.raises(ValueError, match="block_size is 4, 8 to 128 is allowed"):
        tiny_config(attention_pattern="big_bird", block_size=4)
