"""Where the question is, and which tokens are global when the caller does not say."""

from typing import Any

import torch
from torch.nn import functional as F

from adaptive_longformer.attention.global_keys import limit_global_tokens
from adaptive_longformer.attention.padding import may_look
from adaptive_longformer.modeling.input_checks import boolean_mask, check_indices
from adaptive_longformer.modeling.padding import effective_mask, first_tokens

# What these values of `config.default_global_tokens` mean: by head, and for all others.
_OF_HEADS = {
    "auto": ({"ForQuestionAnswering": "question"}, "first"),
    "longformer": (
        {
            "ForSequenceClassification": "first",
            "ForQuestionAnswering": "question",
            "ForMultipleChoice": "after_separator",
        },
        "none",
    ),
}


def default_strategy(strategy: str, head: str, attention_pattern: str = "") -> str:
    """The strategy of `default_global_mask` that a configuration means for a head.

    Args:
        strategy, attention_pattern: `default_global_tokens` and `attention_pattern` of the
            configuration.
        head: what the name of the model's class ends with, as "ForMultipleChoice".
    """
    if strategy == "auto" and attention_pattern == "big_bird":
        return "none"  # it has its global blocks
    by_head, otherwise = _OF_HEADS.get(strategy, ({}, strategy))
    return by_head.get(head, otherwise)


def encoder_masks(
    config: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    global_attention_mask: torch.Tensor | None,
    validate: bool,
    *,
    head: str,
    input_ids: torch.Tensor | None = None,
    token_type_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The caller's masks as the attention layers take them, with the default global tokens.

    Args:
        config: a configuration with the attention fields of `AdaptiveSparseConfig`.
        hidden_states: [batch, length, hidden_size], for the shape and the device.
        attention_mask: [batch, length], 1 for tokens, 0 for padding; None: no padding.
        global_attention_mask: [batch, length], 1 for global tokens; None: the default.
        validate: also read the values when that needs a device synchronisation.
        head: see `default_strategy`.
        input_ids, token_type_ids: [batch, length], where the default looks for the question.

    Returns:
        Which tokens are not padding and which are global, bool [batch, length] on the device of the
        hidden states; None for a mask seen to have no effect.

    Raises:
        ValueError: a mask has a wrong type, shape or value.
    """
    batch_size, length, _ = hidden_states.shape
    shape, device = (batch_size, length), hidden_states.device
    valid = boolean_mask("attention_mask", attention_mask, shape, validate)
    is_mask = isinstance(global_attention_mask, torch.Tensor)
    if valid is not None and is_mask and global_attention_mask.shape == valid.shape:
        # LED's tokenizer pads with -1.
        padding = (global_attention_mask == -1) & ~valid.to(global_attention_mask.device)
        global_attention_mask = global_attention_mask.masked_fill(padding, 0)
    global_mask = boolean_mask("global_attention_mask", global_attention_mask, shape, validate)
    valid = effective_mask(valid, device)
    if not config.uses_global_tokens:
        return valid, None
    if global_mask is None:
        global_mask = default_global_mask(
            default_strategy(config.default_global_tokens, head, config.attention_pattern),
            torch.ones(shape, dtype=torch.bool, device=device) if valid is None else valid,
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            sep_token_id=config.sep_token_id,
        )
    if global_mask is None:
        return valid, None
    global_mask = global_mask.to(device)
    if config.max_global_tokens is not None:
        global_mask = limit_global_tokens(global_mask, config.max_global_tokens)
    if may_look(global_mask) and not global_mask.any():
        return valid, None
    return valid, global_mask


def default_global_mask(
    strategy: str,
    valid: torch.Tensor,
    *,
    input_ids: torch.Tensor | None = None,
    token_type_ids: torch.Tensor | None = None,
    sep_token_id: int | None = None,
) -> torch.Tensor | None:
    """Marks the global tokens that a strategy of the configuration stands for.

    Only tensor operations, nothing waits for the device. Rows in which a strategy finds no token
    fall back to their first valid token; rows without a valid token have no global token.

    Args:
        strategy: "none"; "first": the first valid token; "question": the tokens before the first
            separator where something follows it (a document alone is no question), or, if the
            tokenizer has no separator, those of token type 0 where both types occur;
            "after_separator": the tokens after the first separator and, if the next token is a
            separator too, after that (RoBERTa puts two between a pair).
        valid: bool [batch, length], True where a token is not padding.
        input_ids: [batch, length], needed to find separators.
        token_type_ids: [batch, length], taken for "question" where there are no separators.
        sep_token_id: the separator; None if the tokenizer has none.

    Returns:
        bool [batch, length], True where a token is global, or None if none is.

    Note:
        Longformer's own heads ask for exactly three separators; any number does here, with the same
        result for three.
    """
    if strategy == "none":
        return None
    first = first_tokens(valid)
    if strategy == "first":
        return first
    if input_ids is not None and sep_token_id is not None:
        separators = (input_ids == sep_token_id) & valid
        start = _through_first(separators)
        if strategy == "question":
            chosen = start & ~separators
            found = (~start & valid).any(dim=1, keepdim=True)
        else:
            follower = F.pad((start & separators)[:, :-1], (1, 0)) & separators
            chosen = ~start & ~follower
            found = separators.any(dim=1, keepdim=True)
    elif strategy == "question" and token_type_ids is not None:
        chosen = token_type_ids == 0
        found = ((token_type_ids != 0) & valid).any(dim=1, keepdim=True)
    else:
        return first
    chosen = chosen & valid & found
    return chosen | (first & ~chosen.any(dim=1, keepdim=True))


def question_tokens(input_ids: torch.Tensor, sep_token_id: int) -> torch.Tensor:
    """BigBird's question, the tokens up to and with the first separator: bool [batch, length].

    A sequence without separator has a question of one token, the first.
    """
    separators = input_ids == sep_token_id
    first_slot = torch.arange(input_ids.shape[1], device=input_ids.device) == 0
    found = separators.any(dim=1, keepdim=True)
    return (_through_first(separators) & found) | (first_slot & ~found)


def question_of_length(
    question_lengths: torch.Tensor, shape: tuple[int, int], device: torch.device, validate: bool
) -> torch.Tensor:
    """The first so many slots ([batch, 1] or [batch]) of every sequence, padding in front counted:
    bool [batch, length]. Raises ValueError on a wrong type, shape or value.
    """
    batch_size, length = shape
    if tuple(question_lengths.shape) not in ((batch_size, 1), (batch_size,)):
        raise ValueError(
            f"question_lengths has shape {tuple(question_lengths.shape)}, "
            f"(batch_size, 1) = {(batch_size, 1)} is needed"
        )
    check_indices("question_lengths", question_lengths, length + 1, "sequence_length + 1", validate)
    slots = torch.arange(length, device=device)
    return slots < question_lengths.to(device).view(-1, 1)


def mask_question(
    logits: torch.Tensor, is_question: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """Logits [batch, length, 2] with 1e6 taken off the tokens that cannot be in the answer.

    These are the question's but the sequence's first token that is not padding, which stands for
    "no answer". (Transformers' BigBird takes slot 0 for it, which under left padding is a pad.)
    """
    valid = torch.ones_like(is_question)
    if attention_mask is not None:
        valid = attention_mask.to(logits.device) > 0
    return logits - (is_question & ~first_tokens(valid))[..., None] * 1e6


def _through_first(separators: torch.Tensor) -> torch.Tensor:
    """The tokens up to and with the first separator; all where there is none."""
    return separators.cumsum(dim=1) - separators.long() == 0
