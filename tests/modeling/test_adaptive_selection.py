import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModel

from adaptive_longformer.attention.functional import attention_probabilities, sparse_attention
from adaptive_longformer.configuration.configuration_adaptive_sparse import AdaptiveSparseConfig
from adaptive_longformer.modeling.adaptive_selection import (
    AdaptiveSelection,
    SelectionState,
    selections,
    set_selection_strength,
)
from adaptive_longformer.modeling.head_budgets import density_loss
from adaptive_longformer.modeling.modeling_adaptive_sparse import (
    AdaptiveSparseForMaskedLM,
    AdaptiveSparseForSequenceClassification,
    AdaptiveSparseForTokenClassification,
    AdaptiveSparseModel,
)
from adaptive_longformer.patterns.block_layout import EntryFlag
from adaptive_longformer.selection.head_weights import BUDGET_RAMP
from adaptive_longformer.testing import (
    MODEL_CLASSES,
    assert_padding_changes_nothing,
    hidden_states_of,
    loss_of,
    tiny_adaptive_model,
    tiny_config,
    tiny_inputs,
    tiny_model,
)

by_name = pytest.mark.parametrize("model_class", MODEL_CLASSES, ids=lambda cls: cls.__name__)


def operations_of(model, inputs):
    with profile(activities=[ProfilerActivity.CPU]) as profiler, torch.no_grad():
        model(**inputs)
    return [event.name for event in profiler.events()]


@pytest.mark.parametrize("length", [10, 70, 900])
@pytest.mark.parametrize("separate", [False, True])
def test_without_strength_it_is_the_source_bit_for_bit(length, separate, tmp_path):
    source = tiny_model(separate_global_projections=separate)
    source.save_pretrained(tmp_path)
    model = AdaptiveSparseModel.from_pretrained(tmp_path, attention_pattern="adaptive").eval()
    source = AdaptiveSparseModel.from_pretrained(tmp_path).eval()
    inputs = tiny_inputs(source, length, padding="left" if length == 70 else "right")
    assert torch.equal(hidden_states_of(model, inputs), hidden_states_of(source, inputs))
    assert operations_of(model, inputs) == operations_of(source, inputs)


def test_without_strength_gradients_are_those_of_the_source(tmp_path):
    source = tiny_model()
    source.save_pretrained(tmp_path)
    model = AdaptiveSparseModel.from_pretrained(tmp_path, attention_pattern="adaptive")
    inputs = tiny_inputs(source, 200)
    loss_of(source, inputs).backward()
    loss_of(model, inputs).backward()
    for name, parameter in model.named_parameters():
        if ".adaptive." in name:
            assert parameter.grad is not None and not parameter.grad.any(), name
        else:
            assert torch.equal(parameter.grad, source.get_parameter(name).grad), name


@by_name
def test_a_checkpoint_of_another_pattern_loads_by_configuration_alone(
    model_class, tmp_path, caplog
):
    tiny_model(model_class).save_pretrained(tmp_path)
    model, report = model_class.from_pretrained(
        tmp_path,
        attention_pattern="adaptive",
        num_learned_global_blocks=1,
        selection_strength=0.5,
        output_loading_info=True,
    )
    assert not any(report.values())
    assert "adaptive" not in caplog.text
    for part in selections(model):
        assert (part.gate == 1).all() and (part.budget == 1).all() and (part.span == 1).all()
        assert (part.strength, part.price) == (0.5, 0)
        assert part.head_budgets.min() > 1000 and part.head_windows.min() > 1000


def test_everything_learned_is_saved_and_loaded(tmp_path):
    model = tiny_adaptive_model(AdaptiveSparseForMaskedLM, num_learned_global_blocks=2)
    model.set_selection_strength(0.25)
    for part in selections(model):
        part.price.fill_(0.125)
        part.head_budgets.fill_(3)
        part.head_windows.fill_(9)
    model.save_pretrained(tmp_path)
    loaded = AdaptiveSparseForMaskedLM.from_pretrained(tmp_path).eval()
    assert loaded.config.selection_strength == 0.25
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    inputs = tiny_inputs(model, 300)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


def test_what_the_caller_changes_wins_over_the_checkpoint(tmp_path):
    model = tiny_adaptive_model()
    model.set_selection_strength(0.25)
    model.save_pretrained(tmp_path)
    changes = {"selection_strength": 0.5, "num_selected_blocks": 6}
    config = AdaptiveSparseConfig.from_pretrained(tmp_path, **changes)
    for loaded in (
        AdaptiveSparseModel.from_pretrained(tmp_path, **changes),
        AdaptiveSparseModel.from_pretrained(tmp_path, config=config),
        AutoModel.from_pretrained(tmp_path, **changes),
    ):
        assert loaded.config.selection_strength == 0.5
        for part in selections(loaded):
            assert part.strength == 0.5
            part.budget.data.fill_(1.0)
            assert part.limits()[0] == [6] * 4
    # Nothing changed, but the two disagree, as after loading an older state.
    for part in selections(model):
        part.strength.fill_(0.75)
    model.save_pretrained(tmp_path)
    assert AdaptiveSparseModel.from_pretrained(tmp_path).config.selection_strength == 0.75


@pytest.mark.parametrize("length", [1, 33, 64, 65, 500, 1000])
@pytest.mark.parametrize("sampling", [False, True], ids=["largest", "drawn"])
def test_every_length_equals_the_dense_definition(length, sampling):
    model = tiny_adaptive_model(
        separate_global_projections=length % 2 == 0, selection_sampling=sampling
    )
    inputs = tiny_inputs(model, length, padding="left" if length % 3 else "right")
    output = hidden_states_of(model, inputs)
    model.config.attention_backend = "reference"
    torch.testing.assert_close(output, hidden_states_of(model, inputs), atol=1e-5, rtol=1e-5)


def test_attention_probabilities_sum_to_one_and_stand_in_their_slots():
    model = tiny_adaptive_model()
    inputs = tiny_inputs(model, 300, padding="left")
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
    padded = inputs["attention_mask"] == 0
    for attention in output.attentions:
        assert attention.shape == (2, 4, 300, 300)
        sums = attention.sum(dim=-1)
        torch.testing.assert_close(sums[0], torch.ones(4, 300))
        assert not attention[1, :, :, padded[1]].any()
        # More than the window and the first token are read.
        position = torch.arange(300)
        far = ((position[:, None] - position).abs() > 16) & (position != 0)
        assert (attention[0] * far).sum() > 1


@pytest.mark.parametrize(
    ("length", "left", "right"),
    [
        (60, 0, 90),
        (300, 1, 0),
        (300, 64, 0),
        (300, 0, 64),
        (20, 700, 24),
        (300, 0, 700),
        (300, 700, 0),
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"selection_candidates": 32},
        {"selection_sampling": True},
        # Positions repeat after 64 tokens.
        {"source_config": {"max_position_embeddings": 66}, "num_selected_blocks": 1},
    ],
    ids=str,
)
def test_padding_changes_nothing(length, left, right, options):
    model = tiny_adaptive_model(**options)
    assert_padding_changes_nothing(model, length, left, right)


def test_sampling_is_saved_and_every_layer_draws_its_own(tmp_path):
    model = tiny_adaptive_model(selection_sampling=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert [part.options.sampling_seed for part in selections(loaded)] == [0, 1]
    inputs = tiny_inputs(model, 400, padding="none")
    expected = hidden_states_of(model, inputs)
    assert torch.equal(hidden_states_of(loaded, inputs), expected)
    plain = AutoModel.from_pretrained(tmp_path, selection_sampling=False)
    assert not torch.equal(hidden_states_of(plain, inputs), expected)


def test_strength_matters_and_choice_reaches_far():
    model = tiny_adaptive_model(num_hidden_layers=1)
    inputs = tiny_inputs(model, 600, padding="none")
    outputs = []
    for strength in (0.0, 1e-3, 0.5, 1.0):
        model.set_selection_strength(strength)
        outputs.append(hidden_states_of(model, inputs))
    differences = [(output - outputs[0]).abs().max() for output in outputs]
    assert 0 < differences[1] < differences[2] < differences[3]


def tiny_selection(**overrides):
    config = tiny_config(
        attention_pattern="adaptive", block_size=8, query_block_size=8, num_selected_blocks=4,
        num_attention_heads=2, hidden_size=8, attention_window=8, selection_strength=0.7,
        **overrides,
    )  # fmt: skip
    return AdaptiveSelection(config, 0).double()


@pytest.mark.parametrize(
    "budget",
    [
        1.0,  # weight 1 of the last block: a kink
        1.1,
        0.5,  # weights 1, 1, 0.5, 0: the second and the fourth at kinks
        0.4,
        0.0,
    ],
)
@pytest.mark.parametrize("span", [1.0, 0.6])
def test_gradients_are_those_of_the_weights_at_and_beside_the_kinks(budget, span):
    """One-sided differences bracket the gradient at a kink and equal it elsewhere."""
    torch.manual_seed(0)
    part = tiny_selection(num_learned_global_blocks=1)
    query, key, value = torch.randn(3, 1, 2, 60, 4, dtype=torch.float64)
    state = SelectionState()
    with torch.no_grad():
        part.budget.fill_(budget)
        part.span.fill_(span)
        part.gate.copy_(torch.tensor([0.9, 0.3]))
        part.global_direction.normal_(generator=torch.Generator().manual_seed(1))

    def loss():
        _, reads = part(query, key, state=state)
        layout, bias, attention_span = reads
        output = sparse_attention(
            query, key, value, layout, entry_bias=bias, span=attention_span, backend="blocked"
        )
        weight = torch.linspace(-1, 1, output.numel(), dtype=torch.float64)
        return (output.flatten() * weight).sum()

    loss().backward()
    step = 1e-6
    for name, parameter in part.named_parameters():
        for index in range(parameter.numel()):
            slopes = []
            for sign in (1, -1):
                with torch.no_grad():
                    start = parameter.view(-1)[index].item()
                    base = loss().item()
                    parameter.view(-1)[index] = start + sign * step
                    slopes.append((loss().item() - base) / (sign * step))
                    parameter.view(-1)[index] = start
            gradient = parameter.grad.view(-1)[index].item()
            assert gradient == gradient
            low, high = min(slopes), max(slopes)
            margin = 1e-5 * max(1.0, abs(low), abs(high))
            assert low - margin <= gradient <= high + margin, (name, index)


def test_gradients_of_queries_keys_and_values_pass_gradcheck():
    torch.manual_seed(0)
    part = tiny_selection()
    tensors = [torch.randn(1, 2, 22, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    state = SelectionState()  # the choice is held fixed, as it has no gradient

    def attend(query, key, value, gate, budget, span):
        with torch.no_grad():
            part(query, key, state=state)
        for name, tensor in (("gate", gate), ("budget", budget), ("span", span)):
            part._parameters[name] = tensor
        query, reads = part(query, key, state=state)
        return sparse_attention(
            query, key, value, reads.pattern_or_layout, entry_bias=reads.entry_bias,
            span=reads.span, backend="blocked",
        )  # fmt: skip

    weights = [
        torch.tensor(values, dtype=torch.float64, requires_grad=True)
        for values in ([0.9, 0.4], [0.8, 0.6], [0.9, 0.7])
    ]
    assert torch.autograd.gradcheck(attend, (*tensors, *weights))


@pytest.mark.parametrize("pattern", ["adaptive", "random_selection", "oracle", "lsh"])
@pytest.mark.parametrize("length", [40, 300])
def test_an_empty_batch_gives_an_empty_result(pattern, length):
    model = tiny_adaptive_model(AdaptiveSparseForMaskedLM, attention_pattern=pattern)
    inputs = tiny_inputs(model, length, batch_size=0)
    for is_training in (False, True):
        logits = model.train(is_training)(**inputs).logits
        assert logits.shape == (0, length, 97)
    logits.sum().backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_entries_of_weight_zero_leave_the_list():
    torch.manual_seed(0)
    part = tiny_selection()
    query, key = torch.randn(2, 1, 2, 200, 4, dtype=torch.float64)
    with torch.no_grad():
        part.budget.copy_(torch.tensor([0.0, 0.25]))  # kappa 0 and 1
        _, reads = part(query, key)
    assert part.limits()[0] == [1, 2]
    far = (reads.pattern_or_layout.flags & 32) != 0
    assert far.sum(dim=-1).amax(dim=-1).tolist() == [[1, 2]]
    expected = torch.log(torch.tensor([0.7 * (BUDGET_RAMP - 1) / BUDGET_RAMP])).item()
    assert reads.entry_bias[0, 0][far[0, 0]].unique().item() == pytest.approx(expected)
    with torch.no_grad():
        part.gate.fill_(0.0)
        _, reads = part(query, key)
    assert not ((reads.pattern_or_layout.flags & 32) != 0).any()
    part = tiny_selection(num_learned_global_blocks=2)
    with torch.no_grad():
        part.gate[0] = 0.0
        _, reads = part(query, key)
    far = ((reads.pattern_or_layout.flags & 32) != 0).sum(dim=-1)
    assert not far[0, 0].any() and far[0, 1].max() == 6


def test_a_narrower_window_reads_less_and_a_full_one_costs_nothing():
    part = tiny_selection()
    query, key = torch.randn(2, 1, 2, 200, 4, dtype=torch.float64)
    with torch.no_grad():
        assert part(query, key)[1].span is None
        part.span[0] = 0.5
        assert part(query, key)[1].span.length.tolist() == [2.0, 4.0]
    assert part(query, key)[1].span is not None


def test_checkpointed_layers_do_not_choose_again(monkeypatch):
    from adaptive_longformer.modeling import adaptive_selection as adaptive

    calls, original = [], adaptive.select_blocks

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(adaptive, "select_blocks", counted)
    model = tiny_adaptive_model(AdaptiveSparseForMaskedLM).train()
    inputs = tiny_inputs(model, 300, with_labels=True)
    loss_of(model, inputs).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for use_reentrant in (False, True):
        calls.clear()
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        loss_of(model, inputs).backward()
        assert len(calls) == 2  # one per layer
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)


@by_name
def test_every_head_trains_the_selection(model_class):
    model = tiny_adaptive_model(model_class, num_learned_global_blocks=1).train()
    inputs = tiny_inputs(model, 300, with_labels=True)
    loss_of(model, inputs).backward()
    # Of the last layer some heads read only a global token, which selects nothing.
    for name in ("gate", "budget", "span", "global_direction"):
        assert getattr(selections(model)[0], name).grad.abs().sum() > 0, name


@pytest.mark.parametrize("length", [5, 300])
def test_parameters_that_took_no_part_get_gradients_of_zero(length):
    model = tiny_adaptive_model(AdaptiveSparseForMaskedLM).train()
    model.set_selection_strength(0.0 if length == 300 else 1.0)
    loss_of(model, tiny_inputs(model, length, with_labels=True)).backward()
    for part in selections(model):
        assert not part.gate.grad.any() and not part.budget.grad.any()
        assert part.span.grad is not None


def test_compiled_model_equals_the_eager_one():
    torch._dynamo.reset()
    model = tiny_adaptive_model(num_hidden_layers=1, num_learned_global_blocks=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = tiny_inputs(model, 100)
    for strength in (0.0, 1.0):
        model.set_selection_strength(strength)
        actual = hidden_states_of(compiled, inputs)
        expected = hidden_states_of(model, inputs)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    loss_of(model.train(), inputs).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss_of(compiled, inputs).backward()
    assert gradients["layers.0.attention.adaptive.gate"].any()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-4)


def test_not_finite_states_raise_when_values_are_checked():
    model = tiny_adaptive_model(AdaptiveSparseForTokenClassification)
    inputs = tiny_inputs(model, 300, padding="none")
    with torch.no_grad():
        model.model.embeddings.position_embeddings.weight[50] = torch.nan
        model(**inputs)
        with pytest.raises(ValueError, match="is NaN or infinite at batch row 0, head 0, token 48"):
            model(**inputs, validate=True)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_strength_out_of_range_is_refused(strength):
    with pytest.raises(ValueError, match=r"strength is .* a number from 0 to 1"):
        tiny_adaptive_model().set_selection_strength(strength)


def test_strength_of_another_pattern_is_refused():
    with pytest.raises(ValueError, match="attention_pattern='adaptive'"):
        set_selection_strength(tiny_model(), 0.5)


def test_density_falls_to_the_target_and_stays():
    model = tiny_adaptive_model(AdaptiveSparseForSequenceClassification, target_density=0.6)
    model.train()
    parameters = [p for part in selections(model) for p in (part.gate, part.budget, part.span)]
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(1.0)
    optimizer = torch.optim.SGD(parameters, lr=2.0)
    densities = []
    for _ in range(250):
        optimizer.zero_grad()
        density_loss(selections(model), 0.6).backward()
        optimizer.step()
        densities.append(torch.stack([part.density() for part in selections(model)]).mean().item())
    assert densities[-50:] == pytest.approx([0.6] * 50, abs=0.03)


def test_density_is_the_share_of_what_may_be_read_from_everything_to_nothing():
    part = tiny_selection()
    with torch.no_grad():
        for parameter in (part.gate, part.budget, part.span):
            parameter.fill_(1.0)
        assert part.density().item() == pytest.approx(1.0)
        assert part.limits()[0] == [4, 4]
        part.gate.fill_(0.1)  # weaker, and as many
        assert part.density().item() == pytest.approx(1.0)
        part.budget[0] = -1 / 4
        part.gate[1] = 0.0
        assert part.limits()[0] == [0, 0]
        window, blocks = part.window.left + part.window.right, 4 * part.options.block_size
        assert part.density().item() == pytest.approx(window / (window + blocks))
        part.span.fill_(-100.0)
        assert part.limits()[1] == [0, 0]
        assert part.density().item() < 2 / (window + blocks)


@pytest.mark.parametrize("model_class", MODEL_CLASSES[1:], ids=lambda cls: cls.__name__)
def test_every_head_adds_the_density_to_its_loss_in_training(model_class):
    model = tiny_adaptive_model(model_class, target_density=0.5)
    inputs = tiny_inputs(model, 40, with_labels=True)
    plain = model(**inputs).loss
    for part in selections(model):
        part.price.fill_(3.0)
    assert torch.equal(model(**inputs).loss, plain)  # evaluation
    density = torch.stack([part.density() for part in selections(model)]).mean()
    excess = density - 0.5
    torch.testing.assert_close(model.train()(**inputs).loss, plain + (3.0 + excess) * excess)
    assert selections(model)[0].price > 3.0 or density < 0.5


@pytest.mark.parametrize("budget", [0, 4])
def test_a_calibrated_window_ends_where_it_says_and_leaves_the_list(budget):
    part = tiny_selection(head_budgets=[[budget] * 2] * 2, head_windows=[[0, 4]] * 2)
    query, key = torch.randn(2, 1, 2, 60, 4, dtype=torch.float64)
    with torch.no_grad():
        _, (layout, entry_bias, span) = part(query, key)
    assert part.limits()[1] == [0, 4]
    near = ((layout.flags & EntryFlag.WINDOW) != 0).sum(dim=-1)
    assert near[0].tolist() == [[1] * 8, [2] + [3] * 6 + [2]]
    probabilities = attention_probabilities(query, key, layout, entry_bias=entry_bias, span=span)
    position = torch.arange(60)
    distance = (position - position[:, None]).abs()
    is_read = (probabilities[0] > 0) & (distance <= 4)
    assert torch.equal(is_read[0], distance == 0)
    assert torch.equal(is_read[1], distance <= 4)
