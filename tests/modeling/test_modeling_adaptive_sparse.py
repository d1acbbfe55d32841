import json

import pytest
import torch
from transformers import LongformerConfig, LongformerModel, RobertaConfig

from adaptive_longformer.modeling.modeling_adaptive_sparse import (
    AdaptiveSparseForMaskedLM,
    AdaptiveSparseForMultipleChoice,
    AdaptiveSparseForQuestionAnswering,
    AdaptiveSparseForSequenceClassification,
    AdaptiveSparseForTokenClassification,
    AdaptiveSparseModel,
)
from adaptive_longformer.testing import (
    MODEL_CLASSES,
    loss_of,
    randomize_all_parameters,
    tiny_config,
    tiny_inputs,
    tiny_model,
)

HEADS = MODEL_CLASSES[1:]
OUTPUTS = ("last_hidden_state", "pooler_output", "logits", "start_logits", "end_logits")

by_name = pytest.mark.parametrize("model_class", MODEL_CLASSES, ids=lambda cls: cls.__name__)


def outputs_of(model, inputs):
    with torch.no_grad():
        outputs = model(**inputs)
    return [outputs[name] for name in OUTPUTS if outputs.get(name) is not None]


def gradients_of(model, inputs):
    model.zero_grad()
    loss_of(model, inputs).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 511, 513, 1024])
@pytest.mark.parametrize("separate", [False, True])
def test_any_length_gives_the_same_as_the_dense_definition(length, separate):
    model = tiny_model(separate_global_projections=separate)
    inputs = tiny_inputs(model, length, padding="left" if length % 2 else "right")
    output = outputs_of(model, inputs)
    model.config.attention_backend = "reference"
    for ours, expected in zip(output, outputs_of(model, inputs)):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pattern", ["full", "sliding_window", "strided", "fixed", "random_blocks"])
def test_every_pattern_gives_the_same_as_the_dense_definition(pattern):
    model = tiny_model(attention_pattern=pattern, attention_stride=16, block_size=16)
    inputs = tiny_inputs(model, 130)
    output = outputs_of(model, inputs)
    model.config.attention_backend = "reference"
    for ours, expected in zip(output, outputs_of(model, inputs)):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@by_name
@pytest.mark.parametrize("head_style", ["roberta", "bert", "big_bird"])
def test_save_and_load_changes_no_output(model_class, head_style, tmp_path):
    model = tiny_model(
        model_class, head_style=head_style, separate_global_projections=True, num_labels=3
    )
    model.save_pretrained(tmp_path)
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    inputs = tiny_inputs(model)
    # Not bitwise: a loaded tensor may be aligned otherwise in memory.
    torch.testing.assert_close(outputs_of(loaded.eval(), inputs), outputs_of(model, inputs))


def test_headless_weights_load_into_a_head_and_only_the_head_is_new(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded, report = AdaptiveSparseForTokenClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


def test_masked_language_head_shares_the_word_embeddings(tmp_path):
    model = tiny_model(AdaptiveSparseForMaskedLM)
    assert model.lm_head.decoder.weight is model.model.embeddings.word_embeddings.weight
    model.save_pretrained(tmp_path)
    loaded = AdaptiveSparseForMaskedLM.from_pretrained(tmp_path)
    assert loaded.lm_head.decoder.weight is loaded.model.embeddings.word_embeddings.weight
    untied = tiny_model(AdaptiveSparseForMaskedLM, tie_word_embeddings=False)
    assert untied.lm_head.decoder.weight is not untied.model.embeddings.word_embeddings.weight


def test_vocabulary_can_be_resized():
    model = tiny_model(AdaptiveSparseForMaskedLM)
    model.resize_token_embeddings(110)
    inputs = tiny_inputs(model)
    inputs["input_ids"][0, 0] = 109
    assert model(**inputs).logits.shape[-1] == 110
    assert model.config.vocab_size == 110
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_fresh_weights_are_initialised():
    model = AdaptiveSparseForMaskedLM(tiny_config(initializer_range=0.5))
    embeddings = model.model.embeddings
    assert not embeddings.word_embeddings.weight[model.config.pad_token_id].any()
    assert 0.4 < model.model.layers[0].attention.query.weight.std() < 0.6
    assert not model.model.layers[0].attention.query.bias.any()
    assert (embeddings.layer_norm.weight == 1).all()


def test_models_do_not_change_the_configuration():
    config = tiny_config(num_labels=3)
    before = config.to_dict()
    for model_class in MODEL_CLASSES:
        model = model_class(config)
        loss_of(model, tiny_inputs(model, with_labels=True))
    assert config.to_dict() == before
    assert config.attention_window == 32


@by_name
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("default_global_tokens", ["none", "auto"])
def test_no_parameter_is_without_gradient(model_class, separate, default_global_tokens):
    model = tiny_model(
        model_class,
        separate_global_projections=separate,
        default_global_tokens=default_global_tokens,
        num_labels=3,
    ).train()
    gradients = gradients_of(model, tiny_inputs(model, with_labels=True))
    assert [name for name, gradient in gradients.items() if gradient is None] == []


@pytest.mark.parametrize("pattern", ["full", "sliding_window"])
@pytest.mark.parametrize("length", [70, 800])
def test_unused_global_projections_have_gradients_of_zero(pattern, length):
    model = tiny_model(attention_pattern=pattern, separate_global_projections=True).train()
    gradients = gradients_of(model, tiny_inputs(model, length))
    for name, gradient in gradients.items():
        assert gradient is not None, name
        if "_global" in name:
            assert not gradient.any(), name


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(dropout, use_reentrant):
    model = tiny_model(
        AdaptiveSparseForTokenClassification,
        separate_global_projections=True,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    ).train()
    inputs = tiny_inputs(model, 90, with_labels=True)
    torch.manual_seed(3)
    expected = gradients_of(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(3)
    for name, gradient in gradients_of(model, inputs).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5)


def test_dropout_is_off_in_evaluation_and_follows_the_seed_in_training():
    model = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    inputs = tiny_inputs(model)
    assert torch.equal(outputs_of(model, inputs)[0], outputs_of(model, inputs)[0])
    model.train()
    torch.manual_seed(0)
    first, second = outputs_of(model, inputs)[0], outputs_of(model, inputs)[0]
    torch.manual_seed(0)
    assert torch.equal(outputs_of(model, inputs)[0], first)
    assert not torch.equal(first, second)


def test_feed_forward_chunks_of_any_size_change_nothing():
    model, inputs = tiny_model(), tiny_inputs(tiny_model())
    chunked = tiny_model(chunk_size_feed_forward=32)
    torch.testing.assert_close(outputs_of(chunked, inputs), outputs_of(model, inputs))


@by_name
def test_bfloat16_is_near_float32(model_class):
    model = tiny_model(model_class, separate_global_projections=True, num_labels=3)
    inputs = tiny_inputs(model, with_labels=True)
    expected = outputs_of(model, inputs)
    model.bfloat16().train()
    loss = loss_of(model, inputs)
    loss.backward()
    assert loss.isfinite()
    for output, reference in zip(outputs_of(model, inputs), expected):
        assert (output.float() - reference).abs().max() < 0.1 * reference.abs().max().clamp(min=1)


@pytest.mark.parametrize("length", [64, 800])
def test_fully_padded_sequence_is_finite_and_disturbs_nobody(length):
    model = tiny_model(
        AdaptiveSparseForSequenceClassification, separate_global_projections=True
    ).train()
    inputs = tiny_inputs(model, length, with_labels=True)
    expected = outputs_of(model, inputs)[0][0]
    inputs["attention_mask"][1] = 0
    inputs["input_ids"][1] = model.config.pad_token_id
    torch.testing.assert_close(outputs_of(model, inputs)[0][0], expected)
    assert all(gradient.isfinite().all() for gradient in gradients_of(model, inputs).values())


@by_name
def test_empty_batch_gives_empty_outputs(model_class):
    model = tiny_model(model_class, separate_global_projections=True)
    for output in outputs_of(model, tiny_inputs(model, batch_size=0)):
        assert output.shape[0] == 0


@pytest.mark.parametrize("length", [70, 800])
def test_padding_changes_no_valid_token(length):
    model = tiny_model(separate_global_projections=True)
    ids = torch.randint(5, 97, (1, length))
    (expected, pooled) = outputs_of(model, {"input_ids": ids})
    for left, right in ((0, 37), (37, 0), (20, 30)):
        padded = torch.nn.functional.pad(ids, (left, right), value=model.config.pad_token_id)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
        output, pooled_output = outputs_of(model, {"input_ids": padded, "attention_mask": mask})
        torch.testing.assert_close(output[:, left : left + length], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pooled_output, pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.int64, torch.float32])
def test_masks_of_any_type_mean_the_same(kind):
    model = tiny_model()
    inputs = tiny_inputs(model)
    inputs["global_attention_mask"] = torch.zeros_like(inputs["input_ids"])
    inputs["global_attention_mask"][:, ::9] = 1
    expected = outputs_of(model, inputs)[0]
    for name in ("attention_mask", "global_attention_mask"):
        inputs[name] = inputs[name].to(kind)
    assert torch.equal(outputs_of(model, inputs)[0], expected)


def test_a_mask_of_ones_is_no_mask():
    model = tiny_model()
    inputs = tiny_inputs(model, padding="none")
    expected = outputs_of(model, {"input_ids": inputs["input_ids"]})
    for output, reference in zip(outputs_of(model, inputs), expected):
        assert torch.equal(output, reference)


def test_bert_positions_count_slots_and_roberta_positions_count_tokens():
    bert = tiny_model(position_style="bert", pad_token_id=0)
    roberta = tiny_model()
    ids = torch.tensor([[1, 1, 7, 8, 1]])
    assert bert.embeddings._position_ids(ids, ids[..., None]).tolist() == [[0, 1, 2, 3, 4]]
    assert roberta.embeddings._position_ids(ids, ids[..., None]).tolist() == [[1, 1, 2, 3, 1]]
    assert roberta.embeddings._position_ids(None, ids[..., None]).tolist() == [[2, 3, 4, 5, 6]]


def test_embeddings_in_place_of_ids_give_the_same():
    model = tiny_model()
    inputs = tiny_inputs(model, padding="none")
    expected = outputs_of(model, inputs)
    words = model.get_input_embeddings()(inputs.pop("input_ids"))
    torch.testing.assert_close(outputs_of(model, {"inputs_embeds": words, **inputs}), expected)


def test_token_types_are_added():
    model = tiny_model(type_vocab_size=2)
    inputs = tiny_inputs(model)
    zeros = torch.zeros_like(inputs["input_ids"])
    expected = outputs_of(model, inputs)[0]
    torch.testing.assert_close(outputs_of(model, {**inputs, "token_type_ids": zeros})[0], expected)
    changed = outputs_of(model, {**inputs, "token_type_ids": zeros + 1})[0]
    assert (changed - expected).abs().max() > 0.01


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("separate", [False, True])
def test_attentions_are_dense_and_their_rows_sum_to_1(padding, separate):
    model = tiny_model(AdaptiveSparseForTokenClassification, separate_global_projections=separate)
    inputs = tiny_inputs(model, 70, padding=padding)
    expected = outputs_of(model, inputs)[0]
    outputs = model(**inputs, output_attentions=True)
    assert len(outputs.attentions) == 2
    for attention in outputs.attentions:
        assert attention.shape == (2, 4, 70, 70)
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, 70))
        if padding == "right":
            assert not attention[1, ..., -23:].any()
    torch.testing.assert_close(outputs.logits, expected)
    assert model(**inputs).attentions is None


def test_attentions_times_values_is_the_output_of_the_layer():
    model = tiny_model()
    inputs = tiny_inputs(model, padding="none")
    with torch.no_grad():
        outputs = model(**inputs, output_attentions=True, output_hidden_states=True)
        layer = model.layers[-1]
        hidden_states = outputs.hidden_states[-2]
        value = layer.attention.value(hidden_states).unflatten(-1, (4, 8)).transpose(1, 2)
        context = (outputs.attentions[-1] @ value).transpose(1, 2).flatten(2)
        attended = layer.attention_layer_norm(layer.attention.output(context) + hidden_states)
        last = layer._feed_forward(attended)
    torch.testing.assert_close(last, outputs.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)


def test_configuration_can_ask_for_attentions_and_hidden_states():
    model = tiny_model(output_attentions=True, output_hidden_states=True)
    outputs = model(**tiny_inputs(model))
    assert len(outputs.attentions) == 2
    assert len(outputs.hidden_states) == 3
    assert model(**tiny_inputs(model), output_attentions=False).attentions is None


def test_attentions_are_returned_under_gradient_checkpointing():
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    outputs = model(**tiny_inputs(model), output_attentions=True)
    outputs.last_hidden_state.sum().backward()
    assert len(outputs.attentions) == 2


@by_name
def test_tuple_holds_the_same_as_the_dict(model_class):
    model = tiny_model(model_class)
    inputs = tiny_inputs(model, with_labels=True)
    with torch.no_grad():
        expected, output = model(**inputs).to_tuple(), model(**inputs, return_dict=False)
        model.config.return_dict = False
        by_config = model(**inputs)
    assert isinstance(output, tuple) and isinstance(by_config, tuple)
    for ours, also, theirs in zip(output, by_config, expected, strict=True):
        assert torch.equal(ours, theirs) and torch.equal(also, theirs)


def global_tokens_of(model, inputs, length=70):
    """The global tokens a model chose: the keys that every query sees, beyond its window."""
    attention = model(**inputs, output_attentions=True).attentions[0]
    attention = attention.view(-1, 4, length, length)
    seen = (attention > 0).all(dim=1)  # [batch, length, length]
    return [row.nonzero().flatten().tolist() for row in seen.all(dim=1)]


def test_first_valid_token_is_global_by_default():
    for model_class in (AdaptiveSparseModel, AdaptiveSparseForTokenClassification):
        model = tiny_model(model_class)
        assert global_tokens_of(model, tiny_inputs(model, padding="left")) == [[0], [23]]
        assert global_tokens_of(
            tiny_model(model_class, default_global_tokens="none"),
            tiny_inputs(model, padding="none"),
        ) == [[], []]


def test_question_is_global_by_default_in_question_answering():
    model = tiny_model(AdaptiveSparseForQuestionAnswering)
    inputs = tiny_inputs(model, padding="none")
    inputs["input_ids"][0, [4, 60]] = model.config.sep_token_id
    assert global_tokens_of(model, inputs) == [[0, 1, 2, 3], [0]]


def test_number_of_global_tokens_can_be_limited():
    model = tiny_model(AdaptiveSparseForQuestionAnswering, max_global_tokens=2)
    inputs = tiny_inputs(model, padding="none")
    inputs["input_ids"][0, [4, 60]] = model.config.sep_token_id
    assert global_tokens_of(model, inputs) == [[0, 1], [0]]


def test_given_global_tokens_replace_the_default():
    model = tiny_model()
    inputs = tiny_inputs(model, padding="none")
    mask = torch.zeros_like(inputs["input_ids"])
    mask[0, 33] = 1
    assert global_tokens_of(model, {**inputs, "global_attention_mask": mask}) == [[33], []]


def inputs_with(**changes):
    inputs = {"input_ids": torch.full((2, 10), 7), "attention_mask": torch.ones(2, 10)}
    return {name: value for name, value in {**inputs, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (inputs_with(input_ids=None), "neither of input_ids and inputs_embeds"),
        (inputs_with(inputs_embeds=torch.ones(2, 10, 32)), "both of input_ids and inputs_embeds"),
        (inputs_with(input_ids=torch.full((10,), 7)), r"input_ids has shape \(10,\)"),
        (inputs_with(input_ids=torch.zeros(2, 0).long()), "sequence_length of at least 1"),
        (
            inputs_with(input_ids=None, inputs_embeds=torch.ones(2, 10, 31)),
            r"inputs_embeds has shape \(2, 10, 31\).*hidden_size = 32",
        ),
        (
            inputs_with(input_ids=torch.full((2, 10), 97)),
            "input_ids has the value 97.*vocab_size = 97",
        ),
        (inputs_with(input_ids=torch.full((2, 10), -1)), "input_ids has the value -1"),
        (inputs_with(input_ids=torch.ones(2, 10)), "input_ids has dtype torch.float32"),
        (inputs_with(token_type_ids=torch.ones(2, 10).long()), "token_type_ids has the value 1"),
        (inputs_with(token_type_ids=torch.ones(2, 9).long()), "token_type_ids has shape"),
        (inputs_with(position_ids=torch.full((2, 10), 1026)), "position_ids has the value 1026"),
        (inputs_with(attention_mask=torch.ones(2, 9)), r"attention_mask has shape \(2, 9\)"),
        (inputs_with(attention_mask=torch.ones(2, 1, 10, 10)), "config.attention_pattern"),
        *(
            (inputs_with(**{name: [[1] * 10] * 2}), f"{name} is a list")
            for name in ("attention_mask", "global_attention_mask", "token_type_ids")
        ),
        (inputs_with(position_ids=3), "position_ids is a int"),
        (inputs_with(input_ids="text"), "input_ids is a str"),
        (inputs_with(input_ids=None, inputs_embeds=[1.0]), "inputs_embeds is a list"),
        (
            inputs_with(input_ids=None, inputs_embeds=torch.ones(2, 10, 32).long()),
            "inputs_embeds has dtype torch.int64",
        ),
        (inputs_with(attention_mask=torch.ones(2, 10) + 1), "value 2.0.*global_attention_mask"),
        (inputs_with(attention_mask=-torch.ones(2, 10)), "value -1.0.*padding"),
        (inputs_with(attention_mask=torch.full((2, 10), float("nan"))), "value nan"),
        (
            inputs_with(attention_mask=torch.ones(2, 10).to(torch.complex64)),
            "dtype torch.complex64",
        ),
        (inputs_with(global_attention_mask=torch.ones(2, 9)), "global_attention_mask has shape"),
        (
            inputs_with(global_attention_mask=torch.full((2, 10), 3)),
            "global_attention_mask has .*3",
        ),
    ],
)
def test_bad_input_names_argument_value_and_what_is_allowed(inputs, message):
    for validate in (False, True):
        with pytest.raises(ValueError, match=message):
            tiny_model()(**inputs, validate=validate)


def test_too_long_sequence_says_how_to_extend():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"1025 tokens, at most .* = 1024 .*--max-positions 1025"):
        model(torch.full((1, 1025), 7))


def test_multiple_choice_without_choices_is_refused():
    model = tiny_model(AdaptiveSparseForMultipleChoice)
    with pytest.raises(
        ValueError, match=r"input_ids has shape \(2, 10\), \(batch_size, num_choices"
    ):
        model(**inputs_with())


@pytest.mark.parametrize("model_class", MODEL_CLASSES[1:3])
def test_labels_and_choices_of_a_wrong_type_are_named(model_class):
    model = tiny_model(model_class)
    inputs = tiny_inputs(model, 10)
    if model_class is AdaptiveSparseForMultipleChoice:
        with pytest.raises(ValueError, match="input_ids is a list"):
            model(input_ids=[[[1]]])
    with pytest.raises(ValueError, match="labels is a list"):
        model(**inputs, labels=[1, 2])


def test_unknown_arguments_are_refused_instead_of_ignored():
    model = tiny_model(AdaptiveSparseForMaskedLM)
    with pytest.raises(TypeError, match="attn_mask"):
        model(torch.full((2, 10), 7), attn_mask=torch.ones(2, 10))
    model(torch.full((2, 10), 7), use_cache=False, head_mask=None)  # ask for nothing


def test_values_set_after_construction_are_checked_by_the_model():
    config = tiny_config()
    config.attention_window = [32, 31]
    with pytest.raises(ValueError, match=r"attention_window is \[32, 31\]"):
        AdaptiveSparseForMaskedLM(config)


@pytest.mark.parametrize("model_class", [AdaptiveSparseModel, AdaptiveSparseForMaskedLM])
def test_loading_another_family_gives_the_convert_command(model_class, tmp_path):
    LongformerModel(
        LongformerConfig(
            vocab_size=97,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            attention_window=[16],
        )
    ).save_pretrained(tmp_path)
    for config in (None, tiny_config()):
        with pytest.raises(ValueError, match=f"adaptive-longformer convert {tmp_path} TARGET"):
            model_class.from_pretrained(tmp_path, config=config)


def test_loading_another_family_from_a_subfolder_is_refused_too(tmp_path):
    RobertaConfig().save_pretrained(tmp_path / "inner")
    with pytest.raises(ValueError, match="model_type is 'roberta'"):
        AdaptiveSparseModel.from_pretrained(tmp_path, subfolder="inner")


def test_missing_source_keeps_the_error_of_transformers(tmp_path):
    with pytest.raises(OSError, match="no file named"):
        AdaptiveSparseModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["sdpa", "flash_attention_2", "flex_attention"])
def test_backends_of_transformers_are_refused_with_ours_named(name, tmp_path):
    with pytest.raises((ValueError, ImportError), match=r"config\.attention_backend|flash"):
        AdaptiveSparseModel._from_config(tiny_config(), attn_implementation=name)


@pytest.mark.parametrize("name", ["eager", "adaptive_sparse"])
def test_attention_implementation_can_be_set_without_effect(name):
    model = AdaptiveSparseModel._from_config(tiny_config(), attn_implementation=name)
    model.set_attn_implementation(name)
    assert len(model(**tiny_inputs(model), output_attentions=True).attentions) == 2


def test_saved_configuration_is_plain_json(tmp_path):
    tiny_model(AdaptiveSparseForMaskedLM).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "adaptive_sparse"
    assert saved["architectures"] == ["AdaptiveSparseForMaskedLM"]
    assert saved["attention_window"] == 32


def test_context_parallelism_is_refused():
    assert tiny_model().supports_context_parallel is False


@pytest.mark.parametrize(
    ("length", "separate"),
    [
        (70, True),
        pytest.param(70, False, marks=pytest.mark.slow),
        pytest.param(800, True, marks=pytest.mark.slow),
        pytest.param(800, False, marks=pytest.mark.slow),
    ],
)
def test_encoder_compiles_without_graph_breaks(length, separate):
    torch._dynamo.reset()
    model = tiny_model(separate_global_projections=separate, num_hidden_layers=1).train()
    inputs = tiny_inputs(model, length)
    expected, gradients = outputs_of(model, inputs), gradients_of(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for output, reference in zip(outputs_of(compiled, inputs), expected):
        torch.testing.assert_close(output, reference, atol=1e-5, rtol=1e-5)
    model.zero_grad()
    loss_of(compiled, inputs).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("length", [70, 800])
@pytest.mark.parametrize("separate", [False, True])
def test_encoder_compiles_with_inductor(length, separate):
    torch._dynamo.reset()
    model = tiny_model(separate_global_projections=separate, num_hidden_layers=1).train()
    inputs = tiny_inputs(model, length)
    gradients = gradients_of(model, inputs)
    model.zero_grad()
    loss_of(torch.compile(model, fullgraph=True), inputs).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-4)


def test_randomize_all_parameters_leaves_none_at_its_start():
    model = AdaptiveSparseForMaskedLM(tiny_config())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    randomize_all_parameters(model)
    for name, parameter in model.named_parameters():
        assert (parameter != before[name]).all(), name


@pytest.mark.parametrize(
    ("head_style", "question_lengths", "message"),
    [
        ("roberta", [[3], [4]], "question_lengths is given.*'big_bird'.*'roberta'"),
        ("big_bird", [3, 4, 5], r"question_lengths has shape \(3,\).*\(2, 1\) is needed"),
        ("big_bird", [[3.0], [4.0]], "question_lengths has dtype torch.float32"),
        ("big_bird", [[3], [71]], r"the value 71.*sequence_length \+ 1 = 71"),
        ("big_bird", [[-1], [7]], "question_lengths has the value -1"),
    ],
)
def test_wrong_question_lengths_are_refused(head_style, question_lengths, message):
    model = tiny_model(AdaptiveSparseForQuestionAnswering, head_style=head_style)
    with pytest.raises(ValueError, match=message):
        model(**tiny_inputs(model, 70), question_lengths=torch.tensor(question_lengths))
