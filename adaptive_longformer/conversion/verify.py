"""Measuring how far the logits of a converted model are from those of its source."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adaptive_longformer.conversion.checkpoint import Checkpoint

# Relative to max(1, largest logit), in float32.
TOLERANCE = 1e-5

# Below this a logit is ruled out: BigBird takes 1e6 off those of the question.
_RULED_OUT = -5e5


@dataclass(frozen=True)
class Agreement:
    """The largest difference between two models' outputs, beside their largest value."""

    difference: float
    largest: float

    @property
    def relative(self) -> float:
        """The difference in units of max(1, largest value)."""
        return self.difference / max(1.0, self.largest)


def check_finite(checkpoint: Checkpoint) -> None:
    """Raise ValueError naming the first tensor that holds NaN or infinity."""
    for name in checkpoint.tensors:
        tensor = checkpoint.load(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise ValueError(f"source: tensor {name} holds NaN or infinite values")


def measure_agreement(
    source: nn.Module,
    converted: nn.Module,
    *,
    head: str,
    max_length: int,
    windows: list[int],
    takes_global_attention_mask: bool,
    target_length: int | None = None,
    with_pooler: bool = True,
    progress: Callable[[str, int, int], None],
) -> Agreement:
    """Run both models on random token ids and return the worst disagreement found.

    Two rows per batch, the second padded on the right; a few lengths around the window; without a
    global mask (each model's own default) and, where the source takes one, with a random one.

    Args:
        target_length: of an encoder-decoder, how many tokens the decoder can read; else None.
    """
    lengths = _lengths(max_length, max(windows))
    worst, largest = 0.0, 0.0
    for step, length in enumerate(lengths):
        for inputs in _inputs(source.config, head, length, takes_global_attention_mask):
            if target_length is not None:
                inputs.update(_decoder_inputs(inputs, source.config, head, target_length))
            with torch.no_grad():
                expected = outputs_of(source, inputs, with_pooler)
                found = outputs_of(converted, inputs, with_pooler)
            if head == "ForCausalLM":
                # Padding, which nobody reads, has other positions: ours are counted without it.
                valid = inputs["attention_mask"] == 1
                expected, found = ([one[valid] for one in outputs] for outputs in (expected, found))
            for one, other in zip(expected, found, strict=True):
                agreement = compare_outputs(one, other)
                worst = max(worst, agreement.difference)
                largest = max(largest, agreement.largest)
        progress("verifying", step + 1, len(lengths))
    return Agreement(worst, largest)


def different_texts(
    source: Any, converted: Any, takes_global_attention_mask: bool, max_length: int
) -> str | None:
    """Return in what two encoder-decoders write other texts, or would by their settings."""
    settings = [model.generation_config.to_diff_dict() for model in (source, converted)]
    for name in sorted({*settings[0], *settings[1]} - {"transformers_version"}):
        values = [setting.get(name) for setting in settings]
        if not name.startswith("_") and values[0] != values[1]:
            return f"{name} in the generation settings, {values[1]!r} instead of {values[0]!r}"
    options = {"do_sample": False, "num_return_sequences": 1, "min_length": 0}
    options["max_new_tokens"] = min(10, max_length - 1)
    for inputs in _inputs(source.config, "", min(17, max_length), takes_global_attention_mask):
        for num_beams in (1, 4):
            texts = [
                m.generate(**inputs, **options, num_beams=num_beams) for m in (source, converted)
            ]
            if not torch.equal(*texts):
                return f"text with {num_beams} beam(s)"
    return None


def compare_outputs(expected: torch.Tensor, found: torch.Tensor) -> Agreement:
    """Compare two tensors of logits; those that are ruled out must be so in both."""
    is_ruled_out = expected < _RULED_OUT
    if not torch.equal(is_ruled_out, found < _RULED_OUT):
        return Agreement(float("inf"), 0.0)
    expected, found = (tensor.masked_fill(is_ruled_out, 0.0) for tensor in (expected, found))
    difference = (expected - found).abs().max().item()
    # A NaN would lose every comparison.
    return Agreement(
        difference if difference == difference else float("inf"), expected.abs().max().item()
    )


def outputs_of(
    model: nn.Module, inputs: dict[str, torch.Tensor], with_pooler: bool = True
) -> list[torch.Tensor]:
    """Return a model's logits, or what a model without a head puts out."""
    output = model(**inputs)
    names = [
        "logits",
        "start_logits",
        "end_logits",
        "last_hidden_state",
        "encoder_last_hidden_state",
    ]
    if with_pooler:
        names.append("pooler_output")
    return [output[name] for name in names if output.get(name) is not None]


def _lengths(max_length: int, window: int) -> list[int]:
    """Return a few lengths, at least one of which has tokens outside each other's window.

    The full length of a long model takes minutes on a CPU and shows nothing new.
    """
    wanted = (17, min(4 * window + 3, 300), window + 3)
    # The longest first: after a short input Transformers' BigBird stays dense.
    return sorted({min(length, max_length) for length in wanted}, reverse=True)


def _inputs(
    config, head: str, length: int, takes_global_attention_mask: bool
) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(length)
    reserved = [config.pad_token_id, getattr(config, "sep_token_id", None), config.eos_token_id]
    usable = [token for token in range(config.vocab_size) if token not in reserved]
    choice = torch.randint(len(usable), (2, length), generator=generator)
    input_ids = torch.tensor(usable)[choice]
    attention_mask = torch.ones_like(input_ids)
    valid = max(1, length - length // 3)
    attention_mask[1, valid:] = 0
    input_ids[1, valid:] = config.pad_token_id if config.pad_token_id is not None else 0
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if getattr(config, "type_vocab_size", 1) > 1:
        shape = input_ids.shape
        inputs["token_type_ids"] = torch.randint(config.type_vocab_size, shape, generator=generator)
    if takes_global_attention_mask:
        global_mask = (torch.rand(input_ids.shape, generator=generator) < 0.05).long()
        global_mask[:, 0] = 1
        yield _as_choices({**inputs, "global_attention_mask": global_mask * attention_mask}, head)
        separator = getattr(config, "sep_token_id", None)
        if head in ("ForQuestionAnswering", "ForMultipleChoice") and separator is not None:
            # Question, two separators, text, separator: what the source insists on.
            if valid < 8:
                return
            for row, end in enumerate((length, valid)):
                input_ids[row, [3, 4, end - 1]] = separator
        elif head == "Model":
            # Without a head of its own the default depends on the head around it.
            inputs["global_attention_mask"] = torch.zeros_like(input_ids)
    elif head == "ForQuestionAnswering" and valid >= 8 and getattr(config, "sep_token_id", None):
        # Question, separator, text, without token types: some models find the question themselves.
        with_question = input_ids.clone()
        with_question[:, 4] = config.sep_token_id
        yield {"input_ids": with_question, "attention_mask": attention_mask}
    yield _as_choices(inputs, head)


def _as_choices(inputs: dict[str, torch.Tensor], head: str) -> dict[str, torch.Tensor]:
    """Make two documents the two choices of one example, if the head wants choices."""
    if head != "ForMultipleChoice":
        return inputs
    return {name: tensor.unsqueeze(0) for name, tensor in inputs.items()}


def _decoder_inputs(
    inputs: dict[str, torch.Tensor], config, head: str, target_length: int
) -> dict[str, torch.Tensor]:
    """A short random text for the decoder, or what makes it read the document itself."""
    input_ids = inputs["input_ids"]
    if head != "ForSequenceClassification":
        length = min(9, target_length, input_ids.shape[1])
        return {"decoder_input_ids": input_ids[:, :length].flip(1)}
    end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    last = inputs["attention_mask"].sum(dim=1, keepdim=True) - 1
    return {"input_ids": input_ids.scatter(1, last, end)}
