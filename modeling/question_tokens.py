"""Which tokens are the question when question and text are one sequence, as BigBird finds them."""

import torch


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
