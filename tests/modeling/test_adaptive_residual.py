"""Residual scores in the models."""

import pytest
import torch

from adaptive_longformer.attention.functional import sparse_attention
from adaptive_longformer.modeling.adaptive_selection import (
    AdaptiveSelection,
    SelectionState,
    selections,
)
from adaptive_longformer.modeling.modeling_adaptive_sparse import (
    AdaptiveSparseForMaskedLM,
    AdaptiveSparseModel,
)
from adaptive_longformer.modeling.modeling_adaptive_sparse_causal import AdaptiveSparseForCausalLM
from adaptive_longformer.modeling.modeling_adaptive_sparse_seq2seq import (
    AdaptiveSparseForConditionalGeneration,
)
from adaptive_longformer.testing import (
    assert_padding_changes_nothing,
    hidden_states_of,
    loss_of,
    tiny_adaptive_model,
    tiny_config,
    tiny_inputs,
    tiny_seq2seq_inputs,
    tiny_seq2seq_model,
    vary_selection,
)


def stronger_scores(model):
    """The same model with scores that change much."""
    with torch.no_grad():
        for part in selections(model):
            part.residual_query.mul_(20)
            part.residual_key.mul_(20)
    return model


@pytest.mark.parametrize("start_nodes", [256, 4])
def test_fresh_residual_scores_change_no_result_and_no_gradient(start_nodes, tmp_path):
    source = tiny_adaptive_model()
    source.save_pretrained(tmp_path)
    model = AdaptiveSparseModel.from_pretrained(tmp_path, residual_rank=8).eval()
    for either in (source, model):
        vary_selection(either, start_nodes=start_nodes, beam_width=2)
    inputs = tiny_inputs(source, 500, padding="left")
    assert torch.equal(hidden_states_of(model, inputs), hidden_states_of(source, inputs))
    loss_of(source, inputs).backward()
    loss_of(model, inputs).backward()
    for name, parameter in source.named_parameters():
        assert torch.equal(model.get_parameter(name).grad, parameter.grad), name
    first = selections(model)[0]
    assert not first.residual_query.grad.any() and first.residual_key.grad.any()


def test_scores_change_the_choice_and_the_weights_of_what_is_read():
    outputs = []
    for scale in (0.0, 1.0):
        model = stronger_scores(tiny_adaptive_model(residual_rank=4, num_hidden_layers=1))
        inputs = tiny_inputs(model, 500)
        with torch.no_grad():
            selections(model)[0].residual_key.mul_(scale)
        outputs.append(hidden_states_of(model, inputs))
        model.config.attention_backend = "reference"
        expected = hidden_states_of(model, inputs)
        torch.testing.assert_close(outputs[-1], expected, atol=1e-5, rtol=1e-5)
    assert (outputs[0] - outputs[1]).abs().max() > 0.01


@pytest.mark.parametrize(("left", "right"), [(1, 0), (64, 0), (0, 64), (700, 0), (0, 700)])
@pytest.mark.parametrize("start_nodes", [256, 2])
def test_padding_changes_nothing(left, right, start_nodes):
    model = stronger_scores(tiny_adaptive_model(residual_rank=4))
    vary_selection(model, start_nodes=start_nodes, beam_width=2)
    assert_padding_changes_nothing(model, 300, left, right)


def test_gradients_through_the_weights_are_those_of_the_scores():
    torch.manual_seed(0)
    config = tiny_config(
        attention_pattern="adaptive", block_size=8, query_block_size=8, num_selected_blocks=2,
        num_attention_heads=2, hidden_size=8, attention_window=8, selection_strength=0.7,
        residual_rank=2,
    )  # fmt: skip
    part = AdaptiveSelection(config, 0).double()
    query, key, value = torch.randn(3, 1, 2, 44, 4, dtype=torch.float64)
    state = SelectionState()  # the choice is held fixed, as it has no gradient

    def attend(residual_query, residual_key):
        part._parameters.update(residual_query=residual_query, residual_key=residual_key)
        _, reads = part(query, key, state=state)
        return sparse_attention(
            query, key, value, reads.pattern_or_layout, entry_bias=reads.entry_bias,
            backend="blocked",
        )  # fmt: skip

    factors = torch.randn(2, 2, 2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        attend, [factor.requires_grad_() for factor in factors], fast_mode=True
    )


def test_residual_scores_are_saved_and_loaded(tmp_path):
    model = tiny_adaptive_model(AdaptiveSparseForMaskedLM, residual_rank=4)
    model.save_pretrained(tmp_path)
    loaded = AdaptiveSparseForMaskedLM.from_pretrained(tmp_path).eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.config.residual_rank == 4


def test_the_encoder_of_an_encoder_decoder_has_residual_scores_too(tmp_path):
    model = tiny_seq2seq_model(
        AdaptiveSparseForConditionalGeneration, attention_pattern="adaptive", block_size=16,
        query_block_size=16, num_selected_blocks=3, selection_strength=1.0, residual_rank=4,
    )  # fmt: skip
    inputs = tiny_seq2seq_inputs(model, 150, with_labels=True)
    model.train()(**inputs).loss.backward()
    for part in selections(model):
        assert part.residual_query.grad.any() and part.residual_key.grad.any()
    model.eval().save_pretrained(tmp_path)
    loaded = AdaptiveSparseForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_a_causal_model_refuses_residual_scores():
    config = tiny_config(attention_pattern="adaptive", residual_rank=2)
    with pytest.raises(ValueError, match="residual_rank is 2, 0 is needed in a causal model"):
        AdaptiveSparseForCausalLM(config)
