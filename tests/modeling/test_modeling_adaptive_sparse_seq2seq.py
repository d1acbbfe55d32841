import json

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    BartConfig,
    CompileConfig,
    DynamicCache,
    EncoderDecoderCache,
    LEDConfig,
    LEDModel,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import BaseModelOutput

from adaptive_longformer.configuration.configuration_adaptive_sparse_seq2seq import (
    AdaptiveSparseSeq2SeqConfig,
)
from adaptive_longformer.modeling import modeling_adaptive_sparse_seq2seq
from adaptive_longformer.modeling.integration.registration import SEQ2SEQ_AUTO_MODELS
from adaptive_longformer.modeling.modeling_adaptive_sparse import AdaptiveSparseModel
from adaptive_longformer.modeling.modeling_adaptive_sparse_seq2seq import (
    AdaptiveSparseForConditionalGeneration,
    AdaptiveSparseSeq2SeqForQuestionAnswering,
    AdaptiveSparseSeq2SeqForSequenceClassification,
    AdaptiveSparseSeq2SeqModel,
    shift_tokens_right,
)
from adaptive_longformer.testing import (
    SEQ2SEQ_MODEL_CLASSES,
    loss_of,
    randomize_all_parameters,
    tiny_seq2seq_config,
    tiny_seq2seq_inputs,
    tiny_seq2seq_model,
    vary_with_position,
)

NORM_STYLES = ("post", "pre")
OUTPUTS = (
    "logits",
    "start_logits",
    "end_logits",
    "last_hidden_state",
    "encoder_last_hidden_state",
)

by_name = pytest.mark.parametrize(
    "model_class", SEQ2SEQ_MODEL_CLASSES, ids=lambda cls: cls.__name__
)
by_norm_style = pytest.mark.parametrize("norm_style", NORM_STYLES)


def outputs_of(model, inputs):
    with torch.no_grad():
        outputs = model(**inputs)
    return [outputs[name] for name in OUTPUTS if outputs.get(name) is not None]


def gradients_of(model, inputs):
    model.zero_grad()
    loss_of(model, inputs).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@by_name
@by_norm_style
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_changes_no_output(model_class, norm_style, tied, tmp_path):
    model = tiny_seq2seq_model(
        model_class,
        norm_style=norm_style,
        tie_word_embeddings=tied,
        separate_global_projections=True,
        num_labels=3,
    )
    model.save_pretrained(tmp_path)
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    inputs = tiny_seq2seq_inputs(model)
    torch.testing.assert_close(outputs_of(loaded.eval(), inputs), outputs_of(model, inputs))


def test_one_table_serves_encoder_decoder_and_language_head(tmp_path):
    model = tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration)
    model.save_pretrained(tmp_path)
    loaded = AdaptiveSparseForConditionalGeneration.from_pretrained(tmp_path)
    for each in (model, loaded):
        table = each.model.encoder.embeddings.word_embeddings.weight
        assert each.model.decoder.embeddings.word_embeddings.weight is table
        assert each.lm_head.weight is table
        assert each.get_input_embeddings().weight is table


def test_headless_weights_load_into_a_head_and_only_the_head_is_new(tmp_path):
    model = tiny_seq2seq_model()
    model.save_pretrained(tmp_path)
    loaded, report = AdaptiveSparseSeq2SeqForQuestionAnswering.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert set(report["missing_keys"]) == {"qa_outputs.weight", "qa_outputs.bias"}
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    generating = AdaptiveSparseForConditionalGeneration.from_pretrained(tmp_path)
    assert not generating.final_logits_bias.any()


def test_vocabulary_can_be_resized():
    model = tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration)
    bias = model.final_logits_bias.clone()
    for size in (110, 90):
        model.resize_token_embeddings(size)
        kept = min(size, bias.shape[1])
        assert model.final_logits_bias.shape == (1, size)
        assert torch.equal(model.final_logits_bias[:, :kept], bias[:, :kept])
        inputs = {"input_ids": torch.full((1, 9), size - 1), "labels": torch.full((1, 3), size - 1)}
        assert model(**inputs).logits.shape[-1] == size
        table = model.get_input_embeddings().weight
        assert model.get_output_embeddings().weight is table
        assert model.model.decoder.embeddings.word_embeddings.weight is table


@by_name
@pytest.mark.parametrize("new", [110, 95])
def test_a_vocabulary_in_several_tables_is_resized_in_all_of_them(model_class, new):
    model = tiny_seq2seq_model(model_class, tie_word_embeddings=False)
    inputs = tiny_seq2seq_inputs(model)
    for ids in (inputs["input_ids"], inputs.get("decoder_input_ids")):
        if ids is not None:
            ids.clamp_(max=94)
    expected = model(**inputs)
    model.resize_token_embeddings(new)
    tables = [model.base_model.encoder, model.base_model.decoder]
    assert [table.get_input_embeddings().weight.shape[0] for table in tables] == [new, new]
    assert model.config.vocab_size == new
    torch.testing.assert_close(model(**inputs)[0][..., :95], expected[0][..., :95])
    if model_class is AdaptiveSparseForConditionalGeneration:
        assert model(**inputs).logits.shape[2] == model.final_logits_bias.shape[1] == new


@pytest.mark.parametrize("use_cache", [False, True])
def test_an_empty_batch_gives_empty_outputs(use_cache):
    model = tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration)
    inputs = {"input_ids": torch.zeros(0, 70).long(), "decoder_input_ids": torch.zeros(0, 5).long()}
    with torch.no_grad():
        outputs = model(**inputs, use_cache=use_cache, output_attentions=True)
    assert outputs.logits.shape == (0, 5, 97)
    assert outputs.cross_attentions[0].shape == (0, 2, 5, 70)


def test_models_do_not_change_the_configuration():
    config = tiny_seq2seq_config(num_labels=3)
    before = config.to_dict()
    for model_class in SEQ2SEQ_MODEL_CLASSES:
        model = model_class(config)
        loss_of(model, tiny_seq2seq_inputs(model, with_labels=True))
    assert config.to_dict() == before


@by_name
@by_norm_style
@pytest.mark.parametrize("default_global_tokens", ["none", "auto"])
def test_no_parameter_is_without_gradient(model_class, norm_style, default_global_tokens):
    model = tiny_seq2seq_model(
        model_class,
        norm_style=norm_style,
        separate_global_projections=True,
        default_global_tokens=default_global_tokens,
        num_labels=3,
    ).train()
    gradients = gradients_of(model, tiny_seq2seq_inputs(model, with_labels=True))
    assert [name for name, gradient in gradients.items() if gradient is None] == []


@pytest.mark.parametrize(
    ("norm_style", "dropout", "use_reentrant"),
    [("post", 0.1, False), ("pre", 0.0, True), ("pre", 0.1, False), ("post", 0.0, True)],
)
def test_gradient_checkpointing_changes_no_gradient(norm_style, dropout, use_reentrant):
    model = tiny_seq2seq_model(
        AdaptiveSparseForConditionalGeneration,
        norm_style=norm_style,
        separate_global_projections=True,
        dropout=dropout,
        attention_dropout=dropout,
        activation_dropout=dropout,
    ).train()
    inputs = tiny_seq2seq_inputs(model, with_labels=True)
    torch.manual_seed(3)
    expected = gradients_of(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(3)
    for name, gradient in gradients_of(model, inputs).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5)


def test_training_mode_with_gradient_checkpointing_changes_no_text():
    model = tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration)
    inputs = tiny_seq2seq_inputs(model)
    expected = generate(model, inputs)
    model.train().gradient_checkpointing_enable()
    assert torch.equal(generate(model, inputs), expected)
    with torch.no_grad():
        cache = model(**inputs).past_key_values
    with pytest.raises(ValueError, match="cache holds 12 tokens, none is allowed in"):
        model(**inputs, past_key_values=cache)


def test_gradient_checkpointing_returns_no_cache():
    model = tiny_seq2seq_model().train()
    model.gradient_checkpointing_enable()
    assert model(**tiny_seq2seq_inputs(model)).past_key_values is None


def test_dropout_is_off_in_evaluation_and_on_in_training():
    for name in ("dropout", "attention_dropout", "activation_dropout"):
        model = tiny_seq2seq_model(**{name: 0.5})
        inputs = tiny_seq2seq_inputs(model)
        assert torch.equal(outputs_of(model, inputs)[0], outputs_of(model, inputs)[0])
        model.train()
        assert not torch.equal(outputs_of(model, inputs)[0], outputs_of(model, inputs)[0]), name


@by_name
def test_bfloat16_is_near_float32(model_class):
    model = tiny_seq2seq_model(model_class, separate_global_projections=True, num_labels=3)
    inputs = tiny_seq2seq_inputs(model, with_labels=True)
    expected = outputs_of(model, inputs)
    model.bfloat16().train()
    loss = loss_of(model, inputs)
    loss.backward()
    assert loss.isfinite()
    for output, reference in zip(outputs_of(model, inputs), expected):
        assert (output.float() - reference).abs().max() < 0.1 * reference.abs().max().clamp(min=1)


@by_norm_style
def test_padding_the_document_or_the_text_changes_no_valid_token(norm_style):
    model = tiny_seq2seq_model(norm_style=norm_style)
    inputs = tiny_seq2seq_inputs(model, padding="none")
    expected, encoded = outputs_of(model, inputs)
    pad = model.config.pad_token_id
    right = {
        "input_ids": F.pad(inputs["input_ids"], (0, 9), value=pad),
        "attention_mask": F.pad(inputs["attention_mask"], (0, 9)),
        "decoder_input_ids": F.pad(inputs["decoder_input_ids"], (0, 5), value=pad),
        "decoder_attention_mask": F.pad(torch.ones_like(inputs["decoder_input_ids"]), (0, 5)),
    }
    output, also_encoded = outputs_of(model, right)
    torch.testing.assert_close(output[:, :12], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(also_encoded[:, :70], encoded, atol=1e-5, rtol=1e-5)


@by_norm_style
def test_a_later_token_changes_nothing_before_it(norm_style):
    model = tiny_seq2seq_model(norm_style=norm_style)
    inputs = tiny_seq2seq_inputs(model)
    before = outputs_of(model, inputs)[0]
    changed = {**inputs, "decoder_input_ids": inputs["decoder_input_ids"].clone()}
    changed["decoder_input_ids"][:, 7] = 5
    after = outputs_of(model, changed)[0]
    assert torch.equal(after[:, :7], before[:, :7])
    assert not torch.equal(after[:, 7:], before[:, 7:])


def test_a_fully_padded_document_is_finite_and_disturbs_nobody():
    model = tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration).train()
    inputs = tiny_seq2seq_inputs(model, with_labels=True)
    expected = outputs_of(model, inputs)[0][0]
    inputs["attention_mask"][1] = 0
    torch.testing.assert_close(outputs_of(model, inputs)[0][0], expected)
    assert all(gradient.isfinite().all() for gradient in gradients_of(model, inputs).values())


@by_norm_style
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_cached_decoding_equals_recomputation(norm_style, padding):
    model = tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration, norm_style=norm_style)
    inputs = tiny_seq2seq_inputs(model, target_length=20)
    ids = inputs.pop("decoder_input_ids")
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[1, slice(0, 6) if padding == "left" else slice(15, None)] = 0
    with torch.no_grad():
        expected = model(**inputs, decoder_input_ids=ids, decoder_attention_mask=mask).logits
        cache, start = None, 0
        encoder_outputs = model.get_encoder()(**inputs)
        for end in (4, 5, 6, 12, 21):  # several tokens at once, and one
            outputs = model(
                attention_mask=inputs["attention_mask"],
                encoder_outputs=encoder_outputs,
                decoder_input_ids=ids[:, start:end],
                decoder_attention_mask=mask[:, :end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = outputs.past_key_values
            valid = mask[:, start:end] == 1
            found, wanted = outputs.logits[valid], expected[:, start:end][valid]
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
            start = end
    assert cache.get_seq_length() == 21


def test_cache_is_returned_unless_told_otherwise():
    model = tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration)
    inputs = tiny_seq2seq_inputs(model)
    assert isinstance(model(**inputs).past_key_values, EncoderDecoderCache)
    assert model(**inputs, use_cache=False).past_key_values is None
    assert model(**tiny_seq2seq_inputs(model, with_labels=True)).past_key_values is None
    model.config.use_cache = False
    assert model(**inputs).past_key_values is None


def writing_model(**options):
    """A model that does not write one token for ever."""
    model = tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration, **options)
    return vary_with_position(model)


def generate(model, inputs, **options):
    """Twelve tokens that depend on the seed alone, where they are drawn."""
    torch.manual_seed(0)
    inputs = {name: value for name, value in inputs.items() if "decoder" not in name}
    return model.generate(**inputs, max_new_tokens=12, min_new_tokens=6, **options)


@by_norm_style
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 2, "do_sample": True},
        {"num_beams": 4, "num_return_sequences": 2, "no_repeat_ngram_size": 2},
    ],
    ids=["greedy", "beams", "sampling", "beam-sampling", "several"],
)
def test_generation_with_and_without_cache_is_the_same(norm_style, options):
    model = writing_model(norm_style=norm_style)
    inputs = tiny_seq2seq_inputs(model)
    inputs["global_attention_mask"] = torch.zeros_like(inputs["input_ids"])
    inputs["global_attention_mask"][:, :3] = 1
    found = generate(model, inputs, **options)
    assert torch.equal(found, generate(model, inputs, use_cache=False, **options))
    assert found.shape[0] == 2 * options.get("num_return_sequences", 1)
    assert len(found.unique()) > 3  # the same token again and again would prove little


def test_generation_is_independent_of_the_padding_of_other_documents():
    model = writing_model()
    inputs = tiny_seq2seq_inputs(model)
    together = generate(model, inputs, num_beams=2)
    valid = inputs["attention_mask"][1] == 1
    alone = generate(model, {"input_ids": inputs["input_ids"][1:, valid]}, num_beams=2)
    assert torch.equal(together[1, : alone.shape[1]], alone[0])


def test_global_mask_is_passed_through_generate():
    model = writing_model(default_global_tokens="none", attention_window=8)
    inputs = tiny_seq2seq_inputs(model, padding="none")
    mask = torch.zeros_like(inputs["input_ids"])

    def first_scores(**more):
        options = dict(return_dict_in_generate=True, output_scores=True, num_beams=2)
        return generate(model, {**inputs, **more}, **options).scores[0]

    assert torch.equal(first_scores(), first_scores(global_attention_mask=mask))
    some = mask.clone()
    some[:, ::5] = 1
    found = first_scores(global_attention_mask=some)
    assert not torch.allclose(found, first_scores(), atol=1e-3)
    with torch.no_grad():
        start = torch.full((2, 1), model.config.decoder_start_token_id)
        inputs["decoder_input_ids"] = start
        logits = model(**inputs, global_attention_mask=some).logits[:, 0]
    logits[:, model.config.eos_token_id] = -torch.inf  # min_new_tokens
    expected = logits.log_softmax(dim=-1)
    expected = found[::2] - found[::2].logsumexp(-1, keepdim=True) - expected
    assert expected[expected.isfinite()].abs().max() < 1e-4


def test_texts_about_one_document_share_its_keys_and_values():
    model = writing_model()
    inputs = tiny_seq2seq_inputs(model)
    ids = inputs.pop("decoder_input_ids")
    ids = torch.cat([ids, ids.flip(1)])[[0, 2, 1, 3]]  # two texts per document
    repeated = {name: tensor.repeat_interleave(2, dim=0) for name, tensor in inputs.items()}
    with torch.no_grad():
        expected = model(**repeated, decoder_input_ids=ids, output_attentions=True)
        found = model(**inputs, decoder_input_ids=ids, output_attentions=True)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(found.cross_attentions, expected.cross_attentions):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert found.past_key_values.cross_attention_cache.layers[0].keys.shape[0] == 2
    outputs = generate(model, inputs, num_beams=4, return_dict_in_generate=True)
    cache = outputs.past_key_values
    assert cache.self_attention_cache.layers[0].keys.shape[0] == 8
    assert cache.cross_attention_cache.layers[0].keys.shape[0] == 2


def test_generation_continues_given_decoder_inputs():
    model = writing_model()
    inputs = tiny_seq2seq_inputs(model, target_length=4)
    found = model.generate(**inputs, max_new_tokens=5, num_beams=2)
    assert torch.equal(found[:, :5], inputs["decoder_input_ids"])


def test_generation_returns_scores_and_attentions_on_request():
    model = tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration)
    outputs = generate(
        model,
        tiny_seq2seq_inputs(model),
        return_dict_in_generate=True,
        output_scores=True,
        output_attentions=True,
        output_hidden_states=True,
    )
    steps = outputs.sequences.shape[1] - 1
    assert len(outputs.scores) == steps
    assert outputs.encoder_attentions[0].shape == (2, 4, 70, 70)
    assert outputs.cross_attentions[-1][0].shape == (2, 2, 1, 70)
    assert outputs.decoder_attentions[-1][0].shape == (2, 2, 1, steps)


@by_norm_style
def test_attentions_are_dense_and_their_rows_sum_to_1(norm_style):
    model = tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration, norm_style=norm_style)
    inputs = tiny_seq2seq_inputs(model)
    expected = outputs_of(model, inputs)[0]
    outputs = model(**inputs, output_attentions=True, output_hidden_states=True)
    for name, shape in (
        ("encoder_attentions", (2, 4, 70, 70)),
        ("decoder_attentions", (2, 2, 12, 12)),
        ("cross_attentions", (2, 2, 12, 70)),
    ):
        assert len(outputs[name]) == 2
        for attention in outputs[name]:
            assert attention.shape == shape
            torch.testing.assert_close(attention.sum(-1), torch.ones(shape[:3]))
    assert not outputs.decoder_attentions[0].triu(1).any()
    assert not outputs.cross_attentions[0][1, ..., -23:].any()
    assert len(outputs.encoder_hidden_states) == len(outputs.decoder_hidden_states) == 3
    assert torch.equal(outputs.encoder_hidden_states[-1], outputs.encoder_last_hidden_state)
    torch.testing.assert_close(outputs.logits, expected)
    plain = model(**inputs)
    assert plain.encoder_attentions is None and plain.cross_attentions is None


def test_decoder_attention_times_values_is_the_output_of_the_layer():
    model = tiny_seq2seq_model(norm_style="pre")
    inputs = tiny_seq2seq_inputs(model)
    with torch.no_grad():
        outputs = model(**inputs, output_attentions=True, output_hidden_states=True)
        layer = model.decoder.layers[0]
        hidden_states = outputs.decoder_hidden_states[0]
        for attention, norm, weights, states in (
            (
                layer.self_attention,
                layer.self_attention_layer_norm,
                outputs.decoder_attentions[0],
                None,
            ),
            (
                layer.cross_attention,
                layer.cross_attention_layer_norm,
                outputs.cross_attentions[0],
                outputs.encoder_last_hidden_state,
            ),
        ):
            read = norm(hidden_states) if states is None else states
            value = attention.value(read).unflatten(-1, (2, 16)).transpose(1, 2)
            context = (weights @ value).transpose(1, 2).flatten(2)
            hidden_states = hidden_states + attention.output(context)
        last = layer._feed_forward(hidden_states)
    torch.testing.assert_close(last, outputs.decoder_hidden_states[1], atol=1e-5, rtol=1e-5)


@by_name
def test_tuple_holds_the_same_as_the_dict(model_class):
    model = tiny_seq2seq_model(model_class, use_cache=False)
    inputs = tiny_seq2seq_inputs(model, with_labels=True)
    with torch.no_grad():
        expected, output = model(**inputs).to_tuple(), model(**inputs, return_dict=False)
        model.config.return_dict = False
        by_config = model(**inputs)
    assert isinstance(output, tuple)
    for ours, also, theirs in zip(output, by_config, expected):
        assert torch.equal(ours, theirs) and torch.equal(also, theirs)


def test_embeddings_in_place_of_ids_give_the_same():
    model = tiny_seq2seq_model(scale_embedding=True)
    inputs = tiny_seq2seq_inputs(model)
    expected = outputs_of(model, inputs)
    words = model.get_input_embeddings()
    inputs["inputs_embeds"] = words(inputs.pop("input_ids"))
    inputs["decoder_inputs_embeds"] = words(inputs.pop("decoder_input_ids"))
    torch.testing.assert_close(outputs_of(model, inputs), expected)


def test_encoder_outputs_of_any_kind_replace_the_document():
    model = tiny_seq2seq_model()
    inputs = tiny_seq2seq_inputs(model)
    expected = outputs_of(model, inputs)
    encoded = model.encoder(inputs.pop("input_ids"), inputs["attention_mask"]).last_hidden_state
    for given in ((encoded,), [encoded], BaseModelOutput(last_hidden_state=encoded)):
        assert torch.equal(outputs_of(model, {**inputs, "encoder_outputs": given})[0], expected[0])


def test_scaled_embeddings_are_multiplied_by_the_root_of_the_width():
    plain, scaled = tiny_seq2seq_model(), tiny_seq2seq_model(scale_embedding=True)
    ids = torch.arange(5, 9)[None]
    words, scaled_words = (model.get_input_embeddings()(ids) for model in (plain, scaled))
    torch.testing.assert_close(scaled_words, words * 32**0.5)


def test_loss_is_cross_entropy_of_the_text_without_a_shift():
    model = tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration)
    inputs = tiny_seq2seq_inputs(model, with_labels=True)
    outputs, labels = model(**inputs), inputs["labels"]
    expected = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(outputs.loss, expected)
    shifted = torch.tensor([[2, *labels[0, :-1]], [2, *labels[1, :-1]]])
    shifted[shifted == -100] = model.config.pad_token_id
    given = model(**inputs, decoder_input_ids=shifted)
    torch.testing.assert_close(given.logits, outputs.logits)
    summed = model(**inputs, num_items_in_batch=torch.tensor(4)).loss
    torch.testing.assert_close(summed, expected * (labels != -100).sum() / 4)


def test_shifted_labels_begin_with_the_start_token():
    labels = torch.tensor([[5, 6, -100], [7, -100, -100]])
    assert shift_tokens_right(labels, 1, 2).tolist() == [[2, 5, 6], [2, 7, 1]]
    with pytest.raises(ValueError, match="pad_token_id has to be defined"):
        shift_tokens_right(labels, None, 2)


def test_classification_reads_the_last_end_token():
    model = tiny_seq2seq_model(AdaptiveSparseSeq2SeqForSequenceClassification, num_labels=3)
    inputs = tiny_seq2seq_inputs(model, 20)
    inputs["input_ids"][0, 4] = model.config.eos_token_id
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
        last = outputs.decoder_hidden_states[-1]
        read = torch.stack([last[0, 19], last[1, 13]])
        torch.testing.assert_close(outputs.logits, model.classifier(read))
        model.config.eos_token_id = [3, 2]
        torch.testing.assert_close(model(**inputs).logits, outputs.logits)


def test_decoder_reads_the_document_if_it_is_given_nothing_else():
    model = tiny_seq2seq_model()
    inputs = tiny_seq2seq_inputs(model)
    del inputs["decoder_input_ids"]
    shifted = shift_tokens_right(inputs["input_ids"], 1, 2)
    expected = outputs_of(model, {**inputs, "decoder_input_ids": shifted})
    assert torch.equal(outputs_of(model, inputs)[0], expected[0])


@pytest.fixture
def warnings_once(monkeypatch):
    """Collects what `warning_once` is called with."""
    messages = []
    monkeypatch.setattr(
        modeling_adaptive_sparse_seq2seq.logger, "warning_once", messages.append, raising=False
    )
    return messages


def test_forgotten_global_mask_is_warned_of_with_the_remedy(warnings_once):
    options = dict(separate_global_projections=True, default_global_tokens="none")
    model = tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration, **options)
    inputs = tiny_seq2seq_inputs(model)
    generate(model, inputs)
    assert len(warnings_once) == 1  # the document is encoded once
    assert 'default_global_tokens = "first"' in warnings_once[0]
    generate(model, {**inputs, "global_attention_mask": torch.zeros_like(inputs["input_ids"])})
    model.config.default_global_tokens = "first"
    generate(model, inputs)
    generate(tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration), inputs)
    assert len(warnings_once) == 1


def test_forgotten_global_mask_is_warned_of_once(caplog):
    modeling_adaptive_sparse_seq2seq.logger.warning_once.cache_clear()
    model = tiny_seq2seq_model(separate_global_projections=True, default_global_tokens="none")
    for seed in range(3):
        model(**tiny_seq2seq_inputs(model, seed=seed))
    found = [record for record in caplog.records if "global_attention_mask" in record.message]
    assert len(found) == 1


@pytest.mark.parametrize("strategy", ["auto", "first"])
def test_first_valid_token_is_global_by_default(strategy):
    model = tiny_seq2seq_model(default_global_tokens=strategy)
    inputs = tiny_seq2seq_inputs(model, padding="left")
    mask = torch.zeros_like(inputs["input_ids"])
    mask[0, 0] = mask[1, 23] = 1
    expected = outputs_of(model, {**inputs, "global_attention_mask": mask})
    assert torch.equal(outputs_of(model, inputs)[1], expected[1])


def test_question_is_global_by_default_in_question_answering():
    model = tiny_seq2seq_model(AdaptiveSparseSeq2SeqForQuestionAnswering)
    inputs = tiny_seq2seq_inputs(model, padding="none")
    inputs["input_ids"][:, 4] = model.config.sep_token_id
    mask = torch.zeros_like(inputs["input_ids"])
    mask[:, :4] = 1
    expected = outputs_of(model, {**inputs, "global_attention_mask": mask})
    assert torch.equal(outputs_of(model, inputs)[0], expected[0])


def inputs_with(**changes):
    inputs = {
        "input_ids": torch.full((2, 10), 7),
        "attention_mask": torch.ones(2, 10),
        "decoder_input_ids": torch.full((2, 4), 7),
    }
    return {name: value for name, value in {**inputs, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (inputs_with(input_ids=None), "neither of input_ids and inputs_embeds"),
        (inputs_with(inputs_embeds=torch.ones(2, 10, 32)), "both of input_ids and inputs_embeds"),
        (
            inputs_with(input_ids=None, inputs_embeds=torch.ones(2, 10, 31)),
            r"inputs_embeds has shape \(2, 10, 31\)",
        ),
        (
            inputs_with(
                input_ids=None, decoder_input_ids=None, inputs_embeds=torch.ones(2, 10, 32)
            ),
            "neither of decoder_input_ids and decoder_inputs_embeds.*give decoder_input_ids",
        ),
        (
            inputs_with(
                input_ids=torch.full((1, 129), 7), attention_mask=None, decoder_input_ids=None
            ),
            "129 tokens cannot take their place.*max_decoder_position_embeddings = 128",
        ),
        (
            inputs_with(decoder_inputs_embeds=torch.ones(2, 4, 32)),
            "both of decoder_input_ids and decoder_inputs_embeds",
        ),
        (inputs_with(decoder_input_ids=torch.zeros(2, 0).long()), "decoder_input_ids has shape"),
        (inputs_with(decoder_input_ids=torch.full((3, 4), 7)), "3 sequences, a multiple of .* = 2"),
        (
            inputs_with(decoder_input_ids=torch.full((2, 129), 7)),
            "the decoder is given 129 tokens.*= 128",
        ),
        (inputs_with(decoder_input_ids=torch.full((2, 4), 97)), "decoder_input_ids has the value"),
        (inputs_with(decoder_attention_mask=torch.ones(2, 5)), "decoder_attention_mask has shape"),
        (inputs_with(input_ids=torch.full((2, 10), 97)), "input_ids has the value 97.*= 97"),
        (inputs_with(attention_mask=torch.ones(2, 9)), r"attention_mask has shape \(2, 9\)"),
        (inputs_with(attention_mask=torch.ones(2, 10) + 1), "value 2.0.*global_attention_mask"),
        (
            inputs_with(global_attention_mask=torch.ones(2, 9)),
            r"global_attention_mask has shape \(2, 9\)",
        ),
        (inputs_with(global_attention_mask=torch.full((2, 10), 3)), "global_attention_mask .*3"),
        (inputs_with(past_key_values=DynamicCache()), "DynamicCache.*EncoderDecoderCache"),
    ],
)
def test_bad_input_names_argument_value_and_what_is_allowed(inputs, message):
    model = tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration)
    for validate in (False, True):
        with pytest.raises(ValueError, match=message):
            model(**inputs, validate=validate)


def test_too_long_document_says_how_to_extend():
    model = tiny_seq2seq_model()
    inputs = {"input_ids": torch.full((1, 1025), 7), "decoder_input_ids": torch.full((1, 2), 7)}
    with pytest.raises(ValueError, match=r"1025 tokens, at most .* = 1024 .*--max-positions 1025"):
        model(**inputs)


def test_classification_without_an_end_token_is_refused():
    model = tiny_seq2seq_model(AdaptiveSparseSeq2SeqForSequenceClassification)
    inputs = tiny_seq2seq_inputs(model, 20)
    with pytest.raises(ValueError, match=r"4 tokens.*length of input_ids = 20"):
        model(**inputs, decoder_input_ids=torch.full((2, 4), 7))
    inputs["input_ids"][1] = 7
    with pytest.raises(ValueError, match="no end-of-sequence token in row 1"):
        model(**inputs)
    with pytest.raises(ValueError, match="input_ids is None"):
        model(encoder_outputs=(torch.ones(2, 20, 32),))


def test_generation_beyond_the_position_table_is_refused_at_its_start():
    model = tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration)
    inputs = {"input_ids": torch.full((1, 10), 7)}
    with pytest.raises(ValueError, match=r"up to 130 tokens.*= 129"):
        model.generate(**inputs, max_new_tokens=129)
    found = model.generate(**inputs, max_new_tokens=128, min_new_tokens=128)
    assert found.shape == (1, 129)
    with pytest.raises(ValueError, match=r"global_attention_mask has shape \(1, 9\)"):
        model.generate(**inputs, max_new_tokens=3, global_attention_mask=torch.ones(1, 9))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_cache_of_fixed_size_gives_the_same_text(num_beams):
    model = vary_with_position(
        tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration, encoder_layers=3)
    )
    inputs = tiny_seq2seq_inputs(model)
    found = generate(model, inputs, num_beams=num_beams, cache_implementation="static")
    assert torch.equal(found, generate(model, inputs, num_beams=num_beams))


def test_decoding_with_a_cache_of_fixed_size_is_one_graph():
    model = tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration)
    assert model._can_compile_fullgraph
    inputs = tiny_seq2seq_inputs(model)
    torch._dynamo.utils.counters.clear()
    compiled = CompileConfig(fullgraph=True, dynamic=False, backend="eager")
    compiled._compile_all_devices = True
    found = generate(model, inputs, cache_implementation="static", compile_config=compiled)
    assert torch.equal(found, generate(model, inputs))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_decoder_of_a_question_answerer_may_keep_its_cache():
    model = tiny_seq2seq_model(AdaptiveSparseSeq2SeqForQuestionAnswering)
    inputs = tiny_seq2seq_inputs(model)
    assert model(**inputs).past_key_values is None
    assert model(**inputs, use_cache=True).past_key_values.get_seq_length() == 12


def test_evaluation_collects_predictions_and_no_hidden_states(tmp_path):
    model = tiny_seq2seq_model(AdaptiveSparseSeq2SeqForSequenceClassification, num_labels=3)
    inputs = tiny_seq2seq_inputs(model, with_labels=True)
    rows = [{name: tensor[row] for name, tensor in inputs.items()} for row in range(2)]
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    predicted = Trainer(model, arguments).predict(rows)
    assert predicted.predictions.shape == (2, 3)


def test_every_text_has_its_adapter_when_beams_are_searched():
    peft = pytest.importorskip("peft")
    model = tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_2_SEQ_LM"), "one")
    adapted.add_adapter("two", peft.LoraConfig(task_type="SEQ_2_SEQ_LM"))
    randomize_all_parameters(adapted, std=0.3).eval()
    inputs = tiny_seq2seq_inputs(model, padding="none")
    options = {"num_beams": 3, "num_return_sequences": 2}
    expected = []
    for row, name in enumerate(["two", "one"]):
        adapted.set_adapter(name)
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        expected.append(generate(adapted, one, **options))
    assert not torch.equal(*expected)
    found = generate(adapted, inputs, adapter_names=["two", "one"], **options)
    assert torch.equal(found, torch.cat(expected))


def test_unknown_arguments_are_refused_instead_of_ignored():
    model = tiny_seq2seq_model()
    with pytest.raises(TypeError, match="token_type_ids"):
        model(**inputs_with(token_type_ids=torch.zeros(2, 10).long()))


def test_values_set_after_construction_are_checked_by_the_model():
    config = tiny_seq2seq_config()
    config.attention_window = [32, 31]
    with pytest.raises(ValueError, match=r"attention_window is \[32, 31\]"):
        AdaptiveSparseForConditionalGeneration(config)


def test_loading_another_family_gives_the_convert_command(tmp_path):
    LEDModel(
        LEDConfig(
            vocab_size=97,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_encoder_position_embeddings=64,
            max_decoder_position_embeddings=64,
            attention_window=[16],
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"adaptive-longformer convert {tmp_path} TARGET"):
        AdaptiveSparseForConditionalGeneration.from_pretrained(tmp_path)


def test_an_encoder_class_does_not_load_an_encoder_decoder(tmp_path):
    tiny_seq2seq_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model_type is 'adaptive_sparse_seq2seq'.*Auto class"):
        AdaptiveSparseModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("backend", ["reference", "blocked", "sdpa"])
def test_backend_of_the_encoder_is_chosen_by_the_configuration(backend):
    model = tiny_seq2seq_model()
    inputs = tiny_seq2seq_inputs(model, 200)
    expected = outputs_of(model, inputs)
    model.config.attention_backend = backend
    torch.testing.assert_close(outputs_of(model, inputs), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="config\\.attention_backend"):
        AdaptiveSparseSeq2SeqModel._from_config(
            tiny_seq2seq_config(), attn_implementation="flex_attention"
        )


@pytest.mark.parametrize("auto_model", SEQ2SEQ_AUTO_MODELS, ids=lambda auto: auto.__name__)
def test_auto_classes_build_and_load_our_models(auto_model, tmp_path):
    model_class = SEQ2SEQ_AUTO_MODELS[auto_model]
    assert type(auto_model.from_config(tiny_seq2seq_config())) is model_class
    tiny_seq2seq_model(model_class).save_pretrained(tmp_path)
    assert type(auto_model.from_pretrained(tmp_path)) is model_class


def test_auto_config_knows_our_model_type():
    config = AutoConfig.for_model("adaptive_sparse_seq2seq")
    assert isinstance(config, AdaptiveSparseSeq2SeqConfig)
    assert not isinstance(config, BartConfig)


def test_saved_configuration_is_plain_json(tmp_path):
    tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "adaptive_sparse_seq2seq"
    assert saved["architectures"] == ["AdaptiveSparseForConditionalGeneration"]
    assert saved["encoder_layers"] == 2 and saved["attention_window"] == 32


def test_lora_adapts_queries_and_values_of_both_sides_and_trains():
    peft = pytest.importorskip("peft")
    model = tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration)
    inputs = tiny_seq2seq_inputs(model, with_labels=True)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_2_SEQ_LM")).train()
    adapted(**inputs).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert {name.split(".")[-4] for name in trained} == {"query", "value"}
    for attention, projection in (
        ("encoder.layers.1.attention", "query"),
        ("encoder.layers.1.attention", "value"),
        ("decoder.layers.0.self_attention", "query"),
        ("decoder.layers.0.cross_attention", "value"),
    ):
        assert any(f"{attention}.{projection}." in name for name in trained)
    del inputs["labels"]
    assert adapted.eval().generate(**inputs, max_new_tokens=3).shape[0] == 2


@pytest.mark.parametrize(
    ("length", "norm_style", "separate"),
    [
        (70, "post", True),
        pytest.param(70, "pre", False, marks=pytest.mark.slow),
        pytest.param(800, "post", True, marks=pytest.mark.slow),
    ],
)
def test_training_compiles_without_graph_breaks(length, norm_style, separate):
    torch.compiler.reset()
    model = tiny_seq2seq_model(
        AdaptiveSparseForConditionalGeneration,
        norm_style=norm_style,
        separate_global_projections=separate,
        default_global_tokens="none" if separate else "first",
        encoder_layers=1,
        decoder_layers=1,
    ).train()
    inputs = tiny_seq2seq_inputs(model, length, with_labels=True)
    expected, gradients = loss_of(model, inputs), gradients_of(model, inputs)
    model.zero_grad()
    loss = loss_of(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-4)


def test_encoder_and_decoding_steps_compile_without_graph_breaks():
    torch.compiler.reset()
    model = tiny_seq2seq_model(
        AdaptiveSparseForConditionalGeneration, encoder_layers=1, decoder_layers=1
    )
    inputs = tiny_seq2seq_inputs(model, target_length=5)
    ids, mask = inputs.pop("decoder_input_ids"), inputs["attention_mask"]
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    encode = torch.compile(model.get_encoder(), fullgraph=True, backend="aot_eager")
    decode = torch.compile(model.get_decoder(), fullgraph=True, backend=count)
    with torch.no_grad():
        expected = model(**inputs, decoder_input_ids=ids)
        document = encode(**inputs).last_hidden_state
        torch.testing.assert_close(document, expected.encoder_last_hidden_state)
        cache, steps = None, []
        for step in range(ids.shape[1]):
            outputs = decode(ids[:, step : step + 1], None, document, mask, cache, use_cache=True)
            cache = outputs.past_key_values
            steps.append(model.lm_head(outputs.last_hidden_state) + model.final_logits_bias)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected.logits, atol=1e-5, rtol=1e-5)
    assert len(graphs) == 3, "an empty cache, one token in it, and any number of them"
