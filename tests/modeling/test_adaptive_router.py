"""The residual router and its auxiliary loss in the models."""

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
    AdaptiveSparseForSequenceClassification,
    AdaptiveSparseModel,
)
from adaptive_longformer.modeling.modeling_adaptive_sparse_causal import AdaptiveSparseForCausalLM
from adaptive_longformer.modeling.modeling_adaptive_sparse_seq2seq import (
    AdaptiveSparseForConditionalGeneration,
)
from adaptive_longformer.modeling.selection_losses import router_loss
from adaptive_longformer.testing import (
    MODEL_CLASSES,
    assert_padding_changes_nothing,
    hidden_states_of,
    loss_of,
    tiny_adaptive_model,
    tiny_config,
    tiny_inputs,
    tiny_seq2seq_inputs,
    tiny_seq2seq_model,
)

TRAINED = {"router_rank": 4, "router_aux_loss_coef": 0.5, "num_learned_global_blocks": 1}


def stronger_router(model):
    """The same model with scores that change much."""
    with torch.no_grad():
        for part in selections(model):
            part.router_query.mul_(20)
            part.router_key.mul_(20)
    return model


@pytest.mark.parametrize("start_nodes", [256, 4])
def test_a_fresh_router_changes_no_result_and_no_gradient(start_nodes, tmp_path):
    source = tiny_adaptive_model(selection_start_nodes=start_nodes, selection_beam_width=2)
    source.save_pretrained(tmp_path)
    model = AdaptiveSparseModel.from_pretrained(tmp_path, router_rank=8).eval()
    inputs = tiny_inputs(source, 500, padding="left")
    assert torch.equal(hidden_states_of(model, inputs), hidden_states_of(source, inputs))
    loss_of(source, inputs).backward()
    loss_of(model, inputs).backward()
    for name, parameter in source.named_parameters():
        assert torch.equal(model.get_parameter(name).grad, parameter.grad), name
    first = selections(model)[0]
    assert not first.router_query.grad.any() and first.router_key.grad.any()


def test_scores_change_the_choice_and_the_weights_of_what_is_read():
    outputs = []
    for scale in (0.0, 1.0):
        model = stronger_router(tiny_adaptive_model(router_rank=4, num_hidden_layers=1))
        inputs = tiny_inputs(model, 500)
        with torch.no_grad():
            selections(model)[0].router_key.mul_(scale)
        outputs.append(hidden_states_of(model, inputs))
        model.config.attention_backend = "reference"
        expected = hidden_states_of(model, inputs)
        torch.testing.assert_close(outputs[-1], expected, atol=1e-5, rtol=1e-5)
    assert (outputs[0] - outputs[1]).abs().max() > 0.01


@pytest.mark.parametrize(("left", "right"), [(1, 0), (64, 0), (0, 64), (700, 0), (0, 700)])
@pytest.mark.parametrize("start_nodes", [256, 2])
def test_padding_changes_nothing(left, right, start_nodes):
    model = stronger_router(
        tiny_adaptive_model(
            router_rank=4, selection_start_nodes=start_nodes, selection_beam_width=2
        )
    )
    assert_padding_changes_nothing(model, 300, left, right)


def test_gradients_through_the_weights_are_those_of_the_scores():
    torch.manual_seed(0)
    config = tiny_config(
        attention_pattern="adaptive", block_size=8, query_block_size=8, num_selected_blocks=2,
        num_attention_heads=2, hidden_size=8, attention_window=8, selection_strength=0.7,
        selection_top_p=1.0, router_rank=2,
    )  # fmt: skip
    part = AdaptiveSelection(config, 0).double()
    query, key, value = torch.randn(3, 1, 2, 44, 4, dtype=torch.float64)
    state = SelectionState()  # the choice is held fixed, as it has no gradient

    def attend(router_query, router_key):
        part._parameters.update(router_query=router_query, router_key=router_key)
        _, reads = part(query, key, state=state)
        return sparse_attention(
            query, key, value, reads.pattern_or_layout, entry_bias=reads.entry_bias,
            backend="blocked",
        )  # fmt: skip

    factors = torch.randn(2, 2, 2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        attend, [factor.requires_grad_() for factor in factors], fast_mode=True
    )


def test_the_auxiliary_loss_trains_the_router_and_the_global_blocks_only():
    model = tiny_adaptive_model(**TRAINED).train()
    assert router_loss(model) == 0
    model(**tiny_inputs(model, 300))
    loss = router_loss(model)
    assert loss > 0 and router_loss(model) == 0  # counts once
    assert [int(part.router_step) for part in selections(model)] == [1, 1]
    loss.backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    names = ("router_query", "router_key", "global_direction")
    assert learned == {
        f"layers.{layer}.attention.adaptive.{name}" for layer in (0, 1) for name in names
    }
    for name in learned:
        assert model.get_parameter(name).grad.any(), name


def test_every_step_looks_at_other_query_blocks_and_no_generator_moves():
    model = tiny_adaptive_model(num_hidden_layers=1, **TRAINED).train()
    inputs = tiny_inputs(model, 900, padding="none")
    state = torch.random.get_rng_state()
    losses = []
    for _ in range(3):
        model(**inputs)
        losses.append(router_loss(model).item())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(set(losses)) == 3
    selections(model)[0].router_step.zero_()
    model(**inputs)
    assert router_loss(model).item() == losses[0]


@pytest.mark.parametrize("model_class", MODEL_CLASSES[1:], ids=lambda cls: cls.__name__)
def test_every_head_adds_the_auxiliary_loss_in_training(model_class):
    model = tiny_adaptive_model(model_class, **TRAINED)
    inputs = tiny_inputs(model, 200, with_labels=True)
    plain = model(**inputs).loss
    model.train()
    once = model(**inputs).loss
    for part in selections(model):
        assert part.router_step == 1
        part.router_step.zero_()
    model.config.router_aux_loss_coef = 1.0
    twice = model(**inputs).loss
    torch.testing.assert_close(once - plain, twice - once)
    assert once > plain + 1e-3
    assert torch.equal(model.eval()(**inputs).loss, plain)


def test_documents_and_strengths_with_nothing_to_choose_have_no_auxiliary_loss():
    model = tiny_adaptive_model(AdaptiveSparseForSequenceClassification, **TRAINED).train()
    loss_of(model, tiny_inputs(model, 300, with_labels=True)).backward()
    for length, strength in ((300, 0.0), (10, 1.0)):
        model.zero_grad()
        model.set_selection_strength(strength)
        model(**tiny_inputs(model, length))
        assert router_loss(model) == 0
        loss_of(model, tiny_inputs(model, length, with_labels=True)).backward()
        for part in selections(model):
            assert part.router_step == 1
            for name in ("router_query", "router_key", "global_direction"):
                gradient = getattr(part, name).grad
                assert gradient is not None and not gradient.any(), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_give_the_same_gradients(use_reentrant, monkeypatch):
    from adaptive_longformer.modeling import adaptive_selection as adaptive

    calls, original = [], adaptive.router_targets

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(adaptive, "router_targets", counted)
    model = tiny_adaptive_model(AdaptiveSparseForMaskedLM, **TRAINED).train()
    inputs = tiny_inputs(model, 300, with_labels=True)
    loss_of(model, inputs).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for part in selections(model):
        part.router_step.zero_()
    calls.clear()
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    loss_of(model, inputs).backward()
    assert len(calls) == 2  # one per layer
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_the_router_is_saved_and_loaded(tmp_path):
    model = tiny_adaptive_model(AdaptiveSparseForMaskedLM, **TRAINED).train()
    loss_of(model, tiny_inputs(model, 300, with_labels=True))
    model.eval().save_pretrained(tmp_path)
    loaded = AdaptiveSparseForMaskedLM.from_pretrained(tmp_path).eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert [int(part.router_step) for part in selections(loaded)] == [1, 1]
    assert loaded.config.router_rank == 4 and loaded.config.router_aux_loss_coef == 0.5


def test_the_encoder_of_an_encoder_decoder_has_the_router_too(tmp_path):
    model = tiny_seq2seq_model(
        AdaptiveSparseForConditionalGeneration, attention_pattern="adaptive", block_size=16,
        query_block_size=16, num_selected_blocks=3, selection_strength=1.0, router_rank=4,
    )  # fmt: skip
    inputs = tiny_seq2seq_inputs(model, 150, with_labels=True)
    plain = model(**inputs).loss
    model.config.router_aux_loss_coef = 0.5
    assert model.train()(**inputs).loss > plain + 1e-3
    model(**inputs).loss.backward()
    for part in selections(model):
        assert part.router_query.grad.any() and part.router_key.grad.any()
    model.eval().save_pretrained(tmp_path)
    loaded = AdaptiveSparseForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_a_causal_model_refuses_a_router():
    config = tiny_config(attention_pattern="adaptive", router_rank=2)
    with pytest.raises(ValueError, match="router_rank is 2, 0 is needed in a causal model"):
        AdaptiveSparseForCausalLM(config)
