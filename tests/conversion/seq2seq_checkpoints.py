"""Source checkpoints of encoder-decoders in which every tensor is random, and inputs for them."""

import functools
import tempfile
from pathlib import Path

import torch
import transformers
from checkpoints import in_tolerances

from adaptive_longformer.conversion.convert import convert_checkpoint
from adaptive_longformer.conversion.families import FAMILIES as TABLES
from adaptive_longformer.conversion.target import SEQ2SEQ
from adaptive_longformer.testing import randomize_all_parameters, vary_with_position

FAMILIES = {"led": "LED", "bigbird_pegasus": "BigBirdPegasus"}
HEADS = {
    "led": ("Model", "ForConditionalGeneration", "ForQuestionAnswering"),
    "bigbird_pegasus": (
        "Model",
        "ForConditionalGeneration",
        "ForQuestionAnswering",
        "ForSequenceClassification",
    ),
}
OUTPUTS = (
    "logits",
    "start_logits",
    "end_logits",
    "last_hidden_state",
    "encoder_last_hidden_state",
)


def source_config(family, **fields):
    """The configuration of a small source."""
    common = dict(
        vocab_size=100,
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=96,
    )
    if family == "led":
        common.update(
            attention_window=64,
            max_encoder_position_embeddings=4096,
            max_decoder_position_embeddings=1100,
        )
    else:
        common.update(
            max_position_embeddings=1100,
            block_size=16,
            num_random_blocks=2,
            use_bias=True,
        )
    common.update(fields)
    return getattr(transformers, FAMILIES[family] + "Config")(**common)


def randomize(model):
    """Make every tensor random so that no part of the model is without effect.

    The feed-forward biases are random around -2, where gelu and its tanh approximation differ most
    relative to their value.
    """
    randomize_all_parameters(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("fc1.bias"):
                parameter.sub_(2)
        for name, buffer in model.named_buffers():
            if name == "final_logits_bias":
                buffer.normal_(std=0.15, generator=torch.Generator().manual_seed(1))
    return model


def source_model(family, head, **fields):
    """A small source model in which every tensor is random."""
    model_class = getattr(transformers, FAMILIES[family] + head)
    if head == "ForSequenceClassification":
        fields.setdefault("num_labels", 3)
    return randomize(model_class(source_config(family, **fields))).eval()


def write_source(folder, family, head, **fields):
    """Write a small source checkpoint; returns the folder."""
    source_model(family, head, **fields).save_pretrained(folder)
    return Path(folder)


def load_converted(folder, head):
    """Load a converted checkpoint with the class of its head."""
    return SEQ2SEQ.classes[head].from_pretrained(folder).eval()


@functools.lru_cache(maxsize=8)
def _models(family, head, varied, fields):
    with tempfile.TemporaryDirectory() as folder:
        lists = {name: list(value) for name, value in fields if isinstance(value, tuple)}
        source = source_model(family, head, **{**dict(fields), **lists})
        if varied:
            # Scaled word embeddings are larger.
            vary_with_position(source, 10.0 if family == "led" else 50.0)
        source.save_pretrained(f"{folder}/source")
        convert_checkpoint(f"{folder}/source", f"{folder}/target")
        return source, load_converted(f"{folder}/target", head)


def models(family, head, varied=False, **fields):
    """A source model and its conversion; lists are given as tuples, and pairs are kept.

    With `varied` what the model writes is not the same token again and again.
    """
    return _models(family, head, varied, tuple(sorted(fields.items())))


def make_inputs(
    config, head, length, padding="none", global_tokens="none", target_length=13, seed=0
):
    """Random inputs of a head: two documents, the second one padded.

    Args:
        padding: "none", "left" or "right".
        global_tokens: "default" (no mask), "none" (a mask of zeros) or "some" (random, some of them
            on padding).
        target_length: tokens the decoder is given; None: it reads the document.
    """
    generator = torch.Generator().manual_seed(1000 * seed + length)
    input_ids = torch.randint(5, config.vocab_size, (2, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    num_padded = length // 3 if padding != "none" else 0
    if num_padded:
        padded = slice(0, num_padded) if padding == "left" else slice(length - num_padded, length)
        input_ids[1, padded] = config.pad_token_id
        attention_mask[1, padded] = 0
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if head == "ForSequenceClassification":
        last = (attention_mask * torch.arange(1, length + 1)).argmax(dim=1, keepdim=True)
        input_ids.scatter_(1, last, config.eos_token_id)
    elif target_length is not None:
        shape = (2, target_length)
        target = torch.randint(5, config.vocab_size, shape, generator=generator)
        target[:, 0] = config.decoder_start_token_id
        inputs["decoder_input_ids"] = target
    if global_tokens == "none" and config.model_type == "led":
        inputs["global_attention_mask"] = torch.zeros_like(input_ids)
    elif global_tokens == "some":
        mask = torch.rand(input_ids.shape, generator=generator) < min(0.5, 6 / length)
        mask[0, length // 2] = True
        inputs["global_attention_mask"] = mask.long()
    return inputs


def outputs_of(model, inputs, valid=None):
    """What a head puts out, and the encoded document (with `valid`, only where that is True)."""
    if hasattr(model.get_encoder(), "set_attention_type"):
        # After one short input Transformers' BigBird-Pegasus stays dense for good.
        model.get_encoder().set_attention_type(model.config.attention_type)
    output = model(**inputs)
    found = {name: output[name] for name in OUTPUTS if output.get(name) is not None}
    if valid is not None:
        found["encoder_last_hidden_state"] = found["encoder_last_hidden_state"][valid]
    return list(found.values())


def compare(source, converted, inputs, converted_inputs=None, valid=None):
    """Run two models and return how far apart their outputs are, in tolerances.

    Every output in its own tolerances: the largest of them would hide mistakes in the others.
    """
    with torch.no_grad():
        expected = outputs_of(source, inputs, valid)
        found = outputs_of(converted, converted_inputs or inputs, valid)
    assert len(expected) == len(found)
    return max(in_tolerances([one], [other]) for one, other in zip(expected, found))


def gradients(model, inputs, name_of):
    """The gradients of a random projection of the outputs, by our names; None counts as zero."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(0)
    total = sum(
        (tensor * torch.randn(tensor.shape, generator=generator)).sum()
        for tensor in outputs_of(model, inputs)
    )
    total.backward()
    return {
        name_of(name): torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


def assert_equal_gradients(family, inputs, source, converted):
    """The gradients of all parameters are those of the source."""
    table = TABLES[family].table
    expected = gradients(source, inputs, table.to_target)
    is_base = converted.base_model is converted
    found = gradients(converted, inputs, lambda name: "model." + name if is_base else name)
    assert expected.keys() == found.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        unit = max(gradient.abs().max().item(), 1e-3 * largest)
        assert (gradient - found[name]).abs().max() <= 1e-4 * unit, name
