"""The coarse tail in the models."""

import pytest
import torch

from adaptive_longformer.analysis.reading_map import reading_maps
from adaptive_longformer.analysis.sparsity import sparsity_report
from adaptive_longformer.modeling.adaptive_selection import selections
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
    tiny_model,
    tiny_seq2seq_inputs,
    tiny_seq2seq_model,
)
from adaptive_longformer.training.calibration import calibrate

BEAM = {"selection_start_nodes": 3, "selection_beam_width": 2}


def test_without_strength_it_is_the_source_bit_for_bit(tmp_path):
    source = tiny_model()
    source.save_pretrained(tmp_path)
    model = AdaptiveSparseModel.from_pretrained(
        tmp_path, attention_pattern="adaptive", coarse_tail=True
    ).eval()
    inputs = tiny_inputs(source, 300)
    before = hidden_states_of(source, inputs)
    assert torch.equal(hidden_states_of(model, inputs), before)
    differences = []
    for strength in (1e-3, 0.1, 1.0):
        model.set_selection_strength(strength)
        differences.append((hidden_states_of(model, inputs) - before).abs().max())
    assert 0 < differences[0] < differences[1] < differences[2]


@pytest.mark.parametrize("length", [1, 40, 65, 300])
@pytest.mark.parametrize("beam", [{}, BEAM], ids=["exact", "beam"])
@pytest.mark.parametrize("separate", [False, True])
def test_every_length_equals_the_dense_definition(length, beam, separate):
    model = tiny_adaptive_model(
        coarse_tail=True, separate_global_projections=separate, **beam
    ).double()
    inputs = tiny_inputs(model, length, padding="left" if length % 2 else "right")
    output = hidden_states_of(model, inputs)
    model.config.attention_backend = "reference"
    torch.testing.assert_close(output, hidden_states_of(model, inputs))


@pytest.mark.parametrize("pattern", ["adaptive", "random_selection", "oracle"])
def test_everything_is_read_so_that_a_far_token_reaches_all(pattern):
    model = tiny_adaptive_model(
        coarse_tail=True, attention_pattern=pattern, num_hidden_layers=1, num_selected_blocks=1,
        default_global_tokens="none",
    )  # fmt: skip
    inputs = tiny_inputs(model, 300, padding="none")
    before = hidden_states_of(model, inputs)
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, 150] = (changed["input_ids"][:, 150] - 4) % 92 + 5
    # What a block that the window touches holds outside of the window is not read: at most 63
    # tokens away.
    far = (torch.arange(300) - 150).abs() > 63
    assert ((hidden_states_of(model, changed) - before)[:, far].abs().amax(dim=-1) > 0).all()


@pytest.mark.parametrize(("left", "right"), [(1, 0), (64, 0), (0, 64), (700, 0), (0, 700)])
@pytest.mark.parametrize("beam", [{}, BEAM], ids=["exact", "beam"])
def test_padding_changes_nothing(left, right, beam):
    model = tiny_adaptive_model(coarse_tail=True, **beam)
    assert_padding_changes_nothing(model, 300, left, right)


def test_attention_probabilities_spread_a_summary_over_its_tokens():
    model = tiny_adaptive_model(coarse_tail=True, **BEAM)
    inputs = tiny_inputs(model, 300, padding="left")
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    position, token = torch.arange(300), inputs["attention_mask"] == 1
    far = (position[:, None] - position).abs() > 63
    for attention in attentions:
        sums = attention.sum(dim=-1).transpose(1, 2)[token]
        torch.testing.assert_close(sums, torch.ones_like(sums))
        assert not attention[1, :, :, ~token[1]].any()
        assert (attention[0, :, far] > 0).all()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_give_the_same_gradients(use_reentrant):
    model = tiny_adaptive_model(
        AdaptiveSparseForMaskedLM, coarse_tail=True, attention_probs_dropout_prob=0.3, **BEAM
    ).train()
    inputs = tiny_inputs(model, 300, with_labels=True)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(0)
        loss_of(model, inputs).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    assert gradients[0]["model.layers.0.attention.adaptive.gate"].all()


@pytest.mark.slow
def test_training_compiles_in_one_graph():
    torch._dynamo.reset()
    model = tiny_adaptive_model(
        AdaptiveSparseForMaskedLM, num_hidden_layers=1, coarse_tail=True, router_rank=4,
        router_aux_loss_coef=0.5, num_learned_global_blocks=1, **BEAM,
    ).train()  # fmt: skip
    (part,) = selections(model)
    inputs = tiny_inputs(model, 100, with_labels=True)
    expected = loss_of(model, inputs)
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    part.router_step.zero_()
    loss = loss_of(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)
    torch.testing.assert_close(loss, expected)
    assert part.router_step == 1
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-4)


def test_calibration_changes_no_output():
    model = tiny_adaptive_model(coarse_tail=True, attention_window=64)
    first, second = selections(model)
    with torch.no_grad():
        first.budget.copy_(torch.tensor([0.3, 0.1, -1.0, 0.05]))
        first.gate[3] = 0.0
        second.budget.fill_(-0.6)  # chooses nothing
        second.span.fill_(0.0)
    inputs = tiny_inputs(model, 400, padding="left")
    expected = hidden_states_of(model, inputs)
    result = calibrate(model, [inputs])
    assert result.head_budgets == [[3, 2, 0, 0], [0, 0, 0, 0]]
    assert result.head_windows[1] == [31] * 4
    torch.testing.assert_close(hidden_states_of(model, inputs), expected, atol=1e-5, rtol=1e-5)


def test_the_report_counts_a_summary_as_a_key():
    model = tiny_adaptive_model(coarse_tail=True)
    with torch.no_grad():
        selections(model)[1].gate.fill_(0.0)
        for part in selections(model):
            part.budget.fill_(1.0)
    inputs = tiny_inputs(model, 320, padding="none", batch_size=1)
    first, second = sparsity_report(model, inputs, sampled_blocks=100).layers
    maps = reading_maps(model, inputs)[0]  # shares of the heads
    unread = (1 - maps).sum(dim=-1).repeat_interleave(16)[1:]  # the first token is global
    assert first.summary_keys == pytest.approx(unread.mean().item())
    assert second.summary_keys == 0
    parts = first.window_keys + first.global_keys + first.selected_keys + first.summary_keys
    assert first.keys_per_query == parts


def test_low_precision_is_near():
    model = tiny_adaptive_model(coarse_tail=True, num_hidden_layers=1)
    inputs = tiny_inputs(model, 300)
    expected = hidden_states_of(model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = hidden_states_of(model, inputs)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, expected, atol=0.1, rtol=0.1)
    low = hidden_states_of(model.bfloat16(), inputs)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, atol=0.1, rtol=0.1)


def test_the_encoder_of_an_encoder_decoder_has_the_tail_too():
    fields = {
        "attention_pattern": "adaptive", "block_size": 16, "query_block_size": 16,
        "num_selected_blocks": 1, "selection_strength": 1.0,
    }  # fmt: skip
    model = tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration, **fields)
    inputs = tiny_seq2seq_inputs(model, 150)
    with torch.no_grad():
        before = model(**inputs).logits
        model.config.coarse_tail = True
        assert not torch.allclose(model(**inputs).logits, before)
    model(**tiny_seq2seq_inputs(model, 150, with_labels=True)).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_a_causal_model_refuses_a_tail():
    config = tiny_config(attention_pattern="adaptive", coarse_tail=True)
    with pytest.raises(ValueError, match="coarse_tail is True, False is needed in a causal model"):
        AdaptiveSparseForCausalLM(config)
