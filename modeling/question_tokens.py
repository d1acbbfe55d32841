"""Which tokens are the question when question and text are one sequence, as BigBird finds them."""

import torch

from adaptive_longformer.modeling.input_checks import check_indices


def first_slots(
    question_lengths: torch.Tensor, shape: tuple[int, int], device: torch.device, validate: bool
) -> torch.Tensor:
    """The first so many slots of every sequence, padding in front counted: bool [batch, length].

    Args:
        question_lengths: [batch, 1] or [batch] whole numbers.
        shape: [batch, length].
        device: where the mask is wanted.
        validate: also read the values when that needs a device synchronisation.

    Raises:
        ValueError: wrong type, shape or values.
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


def question_tokens(input_ids: torch.Tensor, sep_token_id: int) -> torch.Tensor:
    """The tokens up to and with the first separator: bool [batch, length].

    A sequence without separator has a question of one token, the first.
    """
    separators = input_ids == sep_token_id
    is_question = separators.cumsum(dim=1) - separators.long() == 0
    first_slot = torch.arange(input_ids.shape[1], device=input_ids.device) == 0
    return torch.where(separators.any(dim=1, keepdim=True), is_question, first_slot)


def mask_question(
    logits: torch.Tensor, is_question: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """Logits [batch, length, 2] with 1e6 taken off the tokens that cannot be in the answer.

    These are the question's but the sequence's first token that is not padding, which stands for
    "no answer". (Transformers' BigBird takes slot 0 for it, which under left padding is a pad.)

    Args:
        logits: [batch, length, 2].
        is_question: bool [batch, length].
        attention_mask: [batch, length], 1 for tokens, 0 for padding. None: no padding.
    """
    valid = torch.ones_like(is_question)
    if attention_mask is not None:
        valid = attention_mask.to(logits.device) > 0
    first = valid & (valid.cumsum(dim=1) == 1)
    return logits - (is_question & ~first)[..., None] * 1e6
