"""Gradients that training does not need: of what a model returns on its way, and of gradients."""

import pytest
import torch

from adaptive_longformer.modeling.modeling_adaptive_sparse_causal import AdaptiveSparseForCausalLM
from adaptive_longformer.testing import (
    tiny_adaptive_model,
    tiny_inputs,
    tiny_model,
    tiny_seq2seq_inputs,
    tiny_seq2seq_model,
)

MAKERS = {
    "longformer": lambda: tiny_model(separate_global_projections=True),
    "big_bird": lambda: tiny_model(attention_pattern="big_bird", block_size=8, num_random_blocks=1),
    "adaptive": lambda: tiny_adaptive_model(attention_window=16),
    "causal": lambda: tiny_model(AdaptiveSparseForCausalLM),
    "adaptive causal": lambda: tiny_adaptive_model(AdaptiveSparseForCausalLM, attention_window=16),
    "encoder-decoder": lambda: tiny_seq2seq_model(separate_global_projections=True),
}
by_kind = pytest.mark.parametrize("kind", MAKERS)


def inputs_of(model, padding="right"):
    make = tiny_seq2seq_inputs if model.config.is_encoder_decoder else tiny_inputs
    return make(model, padding=padding)


@pytest.mark.parametrize("padding", ["right", "left"])
@by_kind
def test_hidden_states_and_attentions_keep_their_gradients(kind, padding):
    model = MAKERS[kind]()
    outputs = model(**inputs_of(model, padding), output_attentions=True, output_hidden_states=True)
    names = [name for name in outputs if name.endswith(("hidden_states", "attentions"))]
    assert len(names) == (5 if model.config.is_encoder_decoder else 2)
    for name in names:
        for tensor in outputs[name]:
            tensor.retain_grad()
    outputs[0].square().sum().backward()
    for name in names:
        for tensor in outputs[name]:
            assert tensor.grad is not None and tensor.grad.any(), name


def penalty(model, words, more):
    """The squared norm of a gradient, as in a gradient penalty."""
    output = model(inputs_embeds=words, **more)[0]
    (gradient,) = torch.autograd.grad(output.square().sum(), words, create_graph=True)
    return gradient.square().sum()


@pytest.mark.parametrize("backend", ["auto", "blocked", "reference"])
@by_kind
def test_gradients_have_gradients(kind, backend):
    model = MAKERS[kind]().double()
    model.config.attention_backend = backend
    more = inputs_of(model)
    words = model.get_input_embeddings()(more.pop("input_ids")).detach().requires_grad_()
    direction = torch.randn(words.shape, dtype=words.dtype, generator=torch.manual_seed(0))
    (gradient,) = torch.autograd.grad(penalty(model, words, more), words)
    step = 1e-6 * direction
    expected = penalty(model, words + step, more) - penalty(model, words - step, more)
    torch.testing.assert_close(
        (gradient * direction).sum(), expected.detach() / 2e-6, rtol=1e-5, atol=1e-5
    )
