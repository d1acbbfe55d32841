"""Which tokens are global when the caller does not say."""

import torch
from torch.nn import functional as F


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
            separator, or, if the tokenizer has no separator, those of token type 0 where both types
            occur; "after_separator": the tokens after the first separator and, if the next token is
            a separator too, after that (RoBERTa puts two between a pair).
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
    first = _first(valid)
    if strategy == "first":
        return first
    if input_ids is not None and sep_token_id is not None:
        separators = (input_ids == sep_token_id) & valid
        if strategy == "question":
            chosen = separators.cumsum(dim=1) == 0
        else:
            chosen = _after_first(separators)
        found = separators.any(dim=1, keepdim=True)
    elif strategy == "question" and token_type_ids is not None:
        chosen = token_type_ids == 0
        found = ((token_type_ids != 0) & valid).any(dim=1, keepdim=True)
    else:
        return first
    chosen = chosen & valid & found
    return torch.where(chosen.any(dim=1, keepdim=True), chosen, first)


def _first(mask: torch.Tensor) -> torch.Tensor:
    return mask & (mask.cumsum(dim=1) == 1)


def _after_first(separators: torch.Tensor) -> torch.Tensor:
    """The tokens after the first separator, without a second one that follows it directly."""
    first = _first(separators)
    after = (separators.cumsum(dim=1) > 0) & ~first
    follower = F.pad(first[:, :-1], (1, 0)) & separators
    return after & ~follower
