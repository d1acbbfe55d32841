"""The checks at the model's edge, and the one place where masks become boolean."""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from adaptive_longformer.attention.padding import may_look
from adaptive_longformer.patterns.pattern import check_types

_MASK_HINTS: dict[Any, str] = {
    2: " (2 marked global tokens in the original Longformer code: keep 1 in attention_mask and "
    "mark those tokens with 1 in global_attention_mask)",
    -1: " (-1 marked padding in the original Longformer code: use 0)",
}
_INTEGERS = (torch.int64, torch.int32)


def boolean_mask(
    name: str, mask: torch.Tensor | None, shape: tuple[int, int], validate: bool
) -> torch.Tensor | None:
    """A mask [batch, length] of 0 and 1 (bool, whole or floating point) as bool; None stays None.

    Raises:
        ValueError: it has a wrong type or shape, or values, where `validate` or `may_look`.
    """
    if mask is None:
        return None
    check_types({name: mask}, torch.Tensor, "a torch.Tensor")
    if tuple(mask.shape) != shape:
        hint = (
            ""
            if mask.ndim == 2
            else " (which pairs may attend is said by config.attention_pattern)"
        )
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}, "
            f"(batch_size, sequence_length) = {shape} is needed{hint}"
        )
    if mask.dtype == torch.bool:
        return mask
    if mask.dtype.is_complex:
        raise ValueError(
            f"{name} has dtype {mask.dtype}, bool, whole or floating point numbers are needed"
        )
    if validate or may_look(mask):
        wrong = (mask != 0) & (mask != 1)
        if wrong.any():
            value = mask[wrong][0].item()
            raise ValueError(
                f"{name} has the value {value}, allowed are 0 and 1{_MASK_HINTS.get(value, '')}"
            )
    return mask > 0


def check_indices(
    name: str, indices: torch.Tensor, size: int, meaning: str, validate: bool
) -> None:
    """Raises ValueError unless all indices are whole numbers in [0, size).

    Args:
        name: the argument, for the error.
        indices: [batch, length].
        size: rows of the table they look up.
        meaning: the configuration's name for `size`.
        validate: also read the values when that needs a device synchronisation.
    """
    check_types({name: indices}, torch.Tensor, "a torch.Tensor")
    if indices.dtype not in _INTEGERS:
        raise ValueError(f"{name} has dtype {indices.dtype}, torch.int64 or torch.int32 is needed")
    if indices.numel() and (validate or may_look(indices)):
        low, high = (value.item() for value in indices.aminmax())
        if low < 0 or high >= size:
            value = low if low < 0 else high
            raise ValueError(
                f"{name} has the value {value}, 0 <= value < {meaning} = {size} is needed"
            )


def check_inputs(
    config: Any,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    validate: bool,
    *,
    token_type_ids: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    prefix: str = "",
) -> tuple[int, int]:
    """The batch size and the length of the input of an encoder or decoder.

    Args:
        config: its configuration.
        input_ids, token_type_ids, position_ids: [batch, length].
        inputs_embeds: [batch, length, hidden_size].
        validate: also read the values when that needs a device synchronisation.
        prefix: before the names of the first two, for the error.

    Raises:
        ValueError: not exactly one of the first two, wrong shape, type or value, or length 0.
    """
    shape = check_tokens(input_ids, inputs_embeds, config.hidden_size, prefix)
    for name, indices, table in (
        (f"{prefix}input_ids", input_ids, "vocab_size"),
        ("token_type_ids", token_type_ids, "type_vocab_size"),
        ("position_ids", position_ids, "max_position_embeddings"),
    ):
        if indices is None:
            continue
        check_types({name: indices}, torch.Tensor, "a torch.Tensor")
        if tuple(indices.shape) not in (shape, (1, shape[1])):
            raise ValueError(
                f"{name} has shape {tuple(indices.shape)}, "
                f"(batch_size, sequence_length) = {shape} is needed"
            )
        check_indices(name, indices, getattr(config, table), table, validate)
    return shape


def check_tokens(
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    hidden_size: int,
    prefix: str = "",
) -> tuple[int, int]:
    """The batch size and the length of the input; `prefix` is before the names in an error.

    Raises:
        ValueError: not exactly one input, wrong shape, or length 0.
    """
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(
            f"{given} of {prefix}input_ids and {prefix}inputs_embeds were given, "
            "exactly one is needed"
        )
    given = {f"{prefix}input_ids": input_ids, f"{prefix}inputs_embeds": inputs_embeds}
    check_types(given, torch.Tensor | None, "a torch.Tensor")
    if input_ids is not None:
        name, shape, needed = "input_ids", input_ids.shape, "(batch_size, sequence_length)"
        fits = len(shape) == 2
    else:
        assert inputs_embeds is not None
        name, shape = "inputs_embeds", inputs_embeds.shape
        if not inputs_embeds.is_floating_point():
            raise ValueError(
                f"{prefix}inputs_embeds has dtype {inputs_embeds.dtype}, a floating-point type is "
                "needed"
            )
        needed = f"(batch_size, sequence_length, hidden_size = {hidden_size})"
        fits = len(shape) == 3 and shape[2] == hidden_size
    if fits and shape[1] == 0:
        needed = "a sequence_length of at least 1"
    elif fits:
        return shape[0], shape[1]
    raise ValueError(f"{prefix}{name} has shape {tuple(shape)}, {needed} is needed")


def check_choices(
    input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
) -> tuple[int, int]:
    """The batch size and the number of choices of a multiple choice input.

    Raises:
        ValueError: the input has no dimension for the choices.
    """
    name, tensor, needed = "input_ids", input_ids, "batch_size, num_choices, sequence_length"
    if tensor is None:
        name, tensor, needed = "inputs_embeds", inputs_embeds, f"{needed}, hidden_size"
    if tensor is None:
        raise ValueError("neither of input_ids and inputs_embeds were given, exactly one is needed")
    check_types({name: tensor}, torch.Tensor, "a torch.Tensor")
    if tensor.ndim != needed.count(",") + 1 or tensor.shape[1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, ({needed}) with at least one choice is needed"
        )
    return tensor.shape[0], tensor.shape[1]


def check_length(length: int, max_sequence_length: int) -> None:
    """Raises ValueError if the position table is too short, and says how to extend it."""
    if length > max_sequence_length:
        raise ValueError(
            f"the sequence has {length} tokens, at most "
            f"config.max_sequence_length = {max_sequence_length} are allowed. Truncate it, "
            "or extend the model: "
            f"adaptive-longformer convert SOURCE TARGET --max-positions {length}"
        )


def check_extra_arguments(extra: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises TypeError on arguments that would be silently ignored; None and False are harmless."""
    for name, value in extra.items():
        if name not in known and value is not None and value is not False:
            raise TypeError(f"forward() got an unexpected argument {name!r}")
