"""What Transformers' GenerationTesterMixin asks for, which no distribution contains."""

import pytest
import torch
from transformers.generation.utils import GenerationMixin

from adaptive_longformer.modeling.modeling_adaptive_sparse_causal import AdaptiveSparseForCausalLM
from adaptive_longformer.testing import (
    AdaptiveSparseForConditionalGeneration,
    left_padded,
    tiny_adaptive_model,
    tiny_model,
    tiny_seq2seq_inputs,
    tiny_seq2seq_model,
    vary_with_position,
)

MAKERS = {
    "causal": lambda: tiny_model(AdaptiveSparseForCausalLM, attention_window=16),
    "adaptive causal": lambda: tiny_adaptive_model(AdaptiveSparseForCausalLM, attention_window=16),
    "encoder-decoder": lambda: tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration),
}
by_kind = pytest.mark.parametrize("kind", MAKERS)
by_causal_kind = pytest.mark.parametrize("kind", list(MAKERS)[:2])
NEW = 12


def model_and_inputs(kind):
    model = vary_with_position(MAKERS[kind]())
    if model.config.is_encoder_decoder:
        inputs = tiny_seq2seq_inputs(model)
        del inputs["decoder_input_ids"]
    else:
        inputs = dict(zip(("input_ids", "attention_mask"), left_padded([50, 33]), strict=True))
    return model, inputs


def generate(model, inputs, **options):
    torch.manual_seed(0)
    length = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 1}
    return model.generate(**inputs, **{**length, **options})


@by_kind
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True},
        {"do_sample": True, "num_beams": 2},
        {"num_beams": 4, "num_return_sequences": 2},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda options: " ".join(options) or "greedy",
)
def test_text_with_a_cache_is_text_without(kind, options):
    model, inputs = model_and_inputs(kind)
    assert isinstance(model, GenerationMixin) and model.can_generate()
    if "prompt_lookup_num_tokens" in options:
        inputs = {name: tensor[:1] for name, tensor in inputs.items()}
        assert torch.equal(generate(model, inputs, **options), generate(model, inputs))
    else:
        found = generate(model, inputs, **options)
        assert torch.equal(found, generate(model, inputs, use_cache=False, **options))


@by_kind
@pytest.mark.parametrize("num_beams", [1, 2])
def test_every_step_returns_what_is_asked_for(kind, num_beams):
    model, inputs = model_and_inputs(kind)
    asked = dict.fromkeys(("output_scores", "output_attentions", "output_hidden_states"), True)
    asked |= {"output_logits": True, "return_dict_in_generate": True, "num_beams": num_beams}
    outputs = generate(model, inputs, **asked)
    assert torch.equal(outputs.sequences, generate(model, inputs, num_beams=num_beams))
    side = "decoder_" if model.config.is_encoder_decoder else ""
    attentions, states = outputs[f"{side}attentions"], outputs[f"{side}hidden_states"]
    assert len(outputs.scores) == len(outputs.logits) == len(attentions) == len(states) == NEW
    rows = 2 * num_beams
    for step in range(NEW):
        assert outputs.scores[step].shape == (rows, 97)
        assert len(attentions[step]) == 2 and len(states[step]) == 3
        length = states[step][0].shape[1]
        assert length == (1 if step or side else 50)
        assert all(state.shape == (rows, length, 32) for state in states[step])
        for attention in attentions[step]:
            assert attention.shape[0] == rows and attention.shape[2] == length
    if side:
        assert outputs.encoder_hidden_states[0].shape == (2, 70, 32)
        assert outputs.cross_attentions[-1][0].shape == (rows, 2, 1, 70)


@by_causal_kind
def test_padding_in_front_changes_no_logit(kind):
    model, _ = model_and_inputs(kind)
    input_ids, mask = left_padded([50, 50])
    mask[1, 40:] = mask[0, 7] = 0
    padded = torch.nn.functional.pad(input_ids, (32, 0), value=1)
    padded_mask = torch.nn.functional.pad(mask, (32, 0))
    with torch.no_grad():
        expected = model(input_ids, mask).logits
        found = model(padded, padded_mask).logits[:, 32:]
    torch.testing.assert_close(found, expected)


@by_causal_kind
def test_text_goes_on_from_embeddings_and_from_a_cache(kind):
    model, inputs = model_and_inputs(kind)
    expected = generate(model, inputs)
    words = model.get_input_embeddings()(inputs["input_ids"])
    embedded = {"inputs_embeds": words, "attention_mask": inputs["attention_mask"]}
    assert torch.equal(generate(model, embedded), expected[:, 50:])
    half = {"max_new_tokens": NEW // 2, "min_new_tokens": NEW // 2}
    first = generate(model, inputs, return_dict_in_generate=True, **half)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW // 2), value=1)
    rest = {"input_ids": first.sequences, "attention_mask": mask}
    rest["past_key_values"] = first.past_key_values
    assert torch.equal(generate(model, rest, **half), expected)


@by_kind
def test_an_assistant_changes_no_text(kind):
    model, inputs = model_and_inputs(kind)
    inputs = {name: tensor[:1] for name, tensor in inputs.items()}
    assistant, _ = model_and_inputs(kind)
    for parameter in assistant.parameters():
        parameter.data.mul_(1.1)
    found = generate(model, inputs, assistant_model=assistant)
    assert torch.equal(found, generate(model, inputs))
