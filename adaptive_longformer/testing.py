"""Makers of tiny models and inputs, and other pieces that tests share."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed, multiprocessing, nn
from torch.multiprocessing.spawn import spawn
from transformers.cache_utils import Cache

from adaptive_longformer.attention.kernels.load import loaded
from adaptive_longformer.configuration.configuration_adaptive_sparse import AdaptiveSparseConfig
from adaptive_longformer.configuration.configuration_adaptive_sparse_seq2seq import (
    AdaptiveSparseSeq2SeqConfig,
)
from adaptive_longformer.modeling.adaptive_selection import selections
from adaptive_longformer.modeling.cache_name import CACHE
from adaptive_longformer.modeling.modeling_adaptive_sparse import (
    AdaptiveSparseForMaskedLM,
    AdaptiveSparseForMultipleChoice,
    AdaptiveSparseForQuestionAnswering,
    AdaptiveSparseForSequenceClassification,
    AdaptiveSparseForTokenClassification,
    AdaptiveSparseModel,
    AdaptiveSparsePreTrainedModel,
)
from adaptive_longformer.modeling.modeling_adaptive_sparse_seq2seq import (
    AdaptiveSparseForConditionalGeneration,
    AdaptiveSparseSeq2SeqForQuestionAnswering,
    AdaptiveSparseSeq2SeqForSequenceClassification,
    AdaptiveSparseSeq2SeqModel,
    AdaptiveSparseSeq2SeqPreTrainedModel,
)

Model = TypeVar("Model", bound=nn.Module)

MODEL_CLASSES: tuple[type[AdaptiveSparsePreTrainedModel], ...] = (
    AdaptiveSparseModel,
    AdaptiveSparseForMaskedLM,
    AdaptiveSparseForMultipleChoice,
    AdaptiveSparseForQuestionAnswering,
    AdaptiveSparseForSequenceClassification,
    AdaptiveSparseForTokenClassification,
)

SEQ2SEQ_MODEL_CLASSES: tuple[type[AdaptiveSparseSeq2SeqPreTrainedModel], ...] = (
    AdaptiveSparseSeq2SeqModel,
    AdaptiveSparseForConditionalGeneration,
    AdaptiveSparseSeq2SeqForQuestionAnswering,
    AdaptiveSparseSeq2SeqForSequenceClassification,
)


def randomize_all_parameters(model: Model, std: float = 0.15, seed: int = 0) -> Model:
    """Draws every parameter anew, biases, paddings and LayerNorms included; returns the model.

    Default initialisation hides mistakes: a zero bias can be dropped, a small score scaled, a
    LayerNorm left out without a test noticing. LayerNorm weights are 1 + N(0, std), all other
    parameters N(0, std).
    """
    generator = torch.Generator().manual_seed(seed)
    ones = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.LayerNorm) and module.weight is not None
    }
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise + 1.0 if id(parameter) in ones else noise)
    return model


def vary_with_position(model: Model, factor: float = 4.0) -> Model:
    """Multiplies the position tables, so that a random model does not repeat one token for ever;
    returns the model.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position" in name:
                parameter.mul_(factor)
    return model


def tiny_config(**overrides: Any) -> AdaptiveSparseConfig:
    """Two layers of width 32 with a window of 32 tokens, without dropout; up to 1024 tokens."""
    values: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 1026,
        "attention_window": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return AdaptiveSparseConfig(**{**values, **overrides})


def tiny_model(
    model_class: type[AdaptiveSparsePreTrainedModel] = AdaptiveSparseModel, **overrides: Any
) -> Any:
    """A model of `tiny_config(**overrides)` in evaluation mode, every parameter random."""
    return randomize_all_parameters(model_class(tiny_config(**overrides))).eval()


def tiny_adaptive_model(
    model_class: type[AdaptiveSparsePreTrainedModel] = AdaptiveSparseModel, **overrides: Any
) -> Any:
    """A tiny model that selects 4 blocks of 16 tokens at full strength, every parameter random.

    Gates, budgets and windows are drawn between 0.5 and 1.
    """
    values: dict[str, Any] = {
        "attention_pattern": "adaptive",
        "block_size": 16,
        "query_block_size": 16,
        "num_selected_blocks": 4,
        "selection_strength": 1.0,
    }
    model = tiny_model(model_class, **{**values, **overrides})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in selections(model):
            for parameter in (part.gate, part.budget, part.span):
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.5 + 0.5)
    return model


def tiny_inputs(
    model: AdaptiveSparsePreTrainedModel,
    length: int = 70,
    *,
    batch_size: int = 2,
    padding: str = "right",
    with_labels: bool = False,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Random inputs for a model, with the dimension of choices and the labels its head takes.

    Args:
        model: which head the inputs are for.
        length: tokens of the longest sequence.
        batch_size: number of sequences, or of questions with 3 choices each.
        padding: "none", or where the last sequence has a third of padding, "right" or "left".
        with_labels: whether to add what the head's loss needs.
        seed: of the random ids.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    is_choice = isinstance(model, AdaptiveSparseForMultipleChoice)
    shape = (batch_size, 3, length) if is_choice else (batch_size, length)

    def random_below(low: int, high: int, size: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(low, high, size, generator=generator)

    input_ids = random_below(5, config.vocab_size, shape)
    attention_mask = torch.ones_like(input_ids)
    num_padded = 0 if padding == "none" else length // 3
    if num_padded and batch_size:
        slots = slice(length - num_padded, None) if padding == "right" else slice(num_padded)
        attention_mask[-1, ..., slots] = 0
    if config.pad_token_id is not None:
        input_ids = input_ids.masked_fill(attention_mask == 0, config.pad_token_id)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if with_labels:
        per_sequence, num_labels = (batch_size,), getattr(config, "num_labels", None) or 2
        if isinstance(model, AdaptiveSparseForMaskedLM):
            inputs["labels"] = random_below(0, config.vocab_size, shape)
        elif isinstance(model, AdaptiveSparseForTokenClassification):
            inputs["labels"] = random_below(0, num_labels, shape)
        elif isinstance(model, AdaptiveSparseForSequenceClassification):
            inputs["labels"] = random_below(0, num_labels, per_sequence)
        elif is_choice:
            inputs["labels"] = random_below(0, 3, per_sequence)
        elif isinstance(model, AdaptiveSparseForQuestionAnswering):
            inputs["start_positions"] = random_below(0, length, per_sequence)
            inputs["end_positions"] = random_below(0, length, per_sequence)
    return inputs


def left_padded(lengths: Sequence[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random sequences of these lengths, padded on the left: ids and mask [sequences, longest]."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    input_ids = torch.randint(5, 97, (len(lengths), longest), generator=generator)
    mask = torch.ones_like(input_ids)
    for row, length in enumerate(lengths):
        mask[row, : longest - length] = 0
    return input_ids.masked_fill(mask == 0, 1), mask


@torch.no_grad()
def logits_in_steps(
    model: nn.Module,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    steps: Iterable[int],
    cache: Cache | None = None,
) -> torch.Tensor:
    """Logits of sequences that a causal model with a cache is given in pieces that end at `steps`,
    and the rest.
    """
    pieces, start = [], 0
    for end in (*steps, input_ids.shape[1]):
        output = model(input_ids[:, start:end], mask[:, :end], cache=cache, use_cache=True)
        pieces.append(output.logits)
        cache, start = output[CACHE], end
    return torch.cat(pieces, dim=1)


def loss_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The head's loss; of a model without head the weighted sum of its outputs."""
    outputs = model(**inputs)
    if "loss" in outputs:
        return outputs["loss"]
    total = torch.zeros(())
    for name in ("last_hidden_state", "pooler_output"):
        if outputs.get(name) is not None:
            weight = torch.linspace(-1, 1, outputs[name].numel(), dtype=outputs[name].dtype)
            total = total + (outputs[name].flatten() * weight).sum()
    return total


def hidden_states_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Last hidden states of a model without head, [batch, length, hidden_size], no gradients."""
    with torch.no_grad():
        return model(**inputs).last_hidden_state


def assert_padding_changes_nothing(
    model: AdaptiveSparseModel, length: int, left: int, right: int
) -> None:
    """Compares texts of `length` tokens with the same behind `left` and before `right` pads."""
    inputs = tiny_inputs(model, length, padding="none")
    expected = hidden_states_of(model, inputs)
    pad = model.config.pad_token_id
    padded = {
        "input_ids": nn.functional.pad(inputs["input_ids"], (left, right), value=pad),
        "attention_mask": nn.functional.pad(inputs["attention_mask"], (left, right)),
    }
    actual = hidden_states_of(model, padded)[:, left : left + length]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@contextmanager
def use_library(kind: str, library: Any) -> Iterator[None]:
    """Has the kernels of a kind, "cpu" or "cuda", run by a library; None: none is loaded yet."""
    before = loaded.pop(kind, None)
    if library is not None:
        loaded[kind] = library
    try:
        yield
    finally:
        loaded.pop(kind, None)
        if before is not None:
            loaded[kind] = before


def run_two_processes(function: Callable[..., None], folder: Path, *args: Any) -> None:
    """Calls `function(rank, folder, *args)` in two new processes, ranks 0 and 1 of a gloo group.

    Args:
        function: of a module's top level; leaves its results in the folder.
        folder: an empty one.
        args: what can be pickled.
    """
    finished = multiprocessing.get_context("spawn").Barrier(2)
    spawn(_as_member, (function, finished, folder, *args), nprocs=2)


def _as_member(rank: int, function: Callable[..., None], finished, folder: Path, *args) -> None:
    torch.set_num_threads(1)
    meeting_point = f"file://{folder}/meeting_point"
    distributed.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=2)
    function(rank, folder, *args)
    finished.wait()
    # Not by destroying the group: its destructor holds the GIL while it waits for a thread that may
    # be waiting for the GIL.
    os._exit(0)


def tiny_seq2seq_config(**overrides: Any) -> AdaptiveSparseSeq2SeqConfig:
    """Two layers of width 32 on each side with a window of 32 tokens, without dropout.

    Documents of up to 1024 tokens, texts of up to 128.
    """
    values: dict[str, Any] = {
        "vocab_size": 97,
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 40,
        "max_encoder_position_embeddings": 1024,
        "max_decoder_position_embeddings": 128,
        "attention_window": 32,
        "dropout": 0.0,
    }
    return AdaptiveSparseSeq2SeqConfig(**{**values, **overrides})


def tiny_seq2seq_model(
    model_class: type[AdaptiveSparseSeq2SeqPreTrainedModel] = AdaptiveSparseSeq2SeqModel,
    **overrides: Any,
) -> Any:
    """A model of `tiny_seq2seq_config(**overrides)` in evaluation mode, every tensor random."""
    model = randomize_all_parameters(model_class(tiny_seq2seq_config(**overrides))).eval()
    if isinstance(model, AdaptiveSparseForConditionalGeneration):
        generator = torch.Generator().manual_seed(1)
        bias = 0.15 * torch.randn(model.final_logits_bias.shape, generator=generator)
        model.final_logits_bias.copy_(bias)
    return model


def tiny_seq2seq_inputs(
    model: AdaptiveSparseSeq2SeqPreTrainedModel,
    length: int = 70,
    *,
    target_length: int = 11,
    padding: str = "right",
    with_labels: bool = False,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Two random documents and what the decoder reads or shall write about them.

    Args:
        model: which head the inputs are for.
        length: tokens of the longest document.
        target_length: tokens of the texts, without the start token.
        padding: "none", or where the last document has a third of padding, "right" or "left".
        with_labels: whether to add what the head's loss needs, in place of the decoder's input.
        seed: of the random ids.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)

    def random_below(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high, size, generator=generator)

    input_ids = random_below(5, config.vocab_size, 2, length)
    attention_mask = torch.ones_like(input_ids)
    num_padded = 0 if padding == "none" else length // 3
    if num_padded:
        slots = slice(length - num_padded, None) if padding == "right" else slice(num_padded)
        attention_mask[-1, slots] = 0
    # The last token of a document is its end.
    last = (attention_mask * torch.arange(1, length + 1)).argmax(dim=1, keepdim=True)
    assert isinstance(config.eos_token_id, int) and config.pad_token_id is not None
    input_ids = input_ids.scatter(1, last, config.eos_token_id)
    input_ids = input_ids.masked_fill(attention_mask == 0, config.pad_token_id)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if isinstance(model, AdaptiveSparseSeq2SeqForSequenceClassification):
        if with_labels:
            inputs["labels"] = random_below(0, config.num_labels or 2, 2)
        return inputs
    target = random_below(5, config.vocab_size, 2, target_length)
    if isinstance(model, AdaptiveSparseForConditionalGeneration) and with_labels:
        target[-1, -3:] = -100
        return {**inputs, "labels": target}
    start = torch.full_like(target[:, :1], config.decoder_start_token_id)
    inputs["decoder_input_ids"] = torch.cat([start, target], dim=1)
    if isinstance(model, AdaptiveSparseSeq2SeqForQuestionAnswering) and with_labels:
        inputs["start_positions"] = random_below(0, target_length, 2)
        inputs["end_positions"] = random_below(0, target_length, 2)
    return inputs
