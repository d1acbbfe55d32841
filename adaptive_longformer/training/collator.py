"""A data collator that marks global tokens, and checks what the model should not have to check."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from adaptive_longformer.modeling.default_global_tokens import default_global_mask
from adaptive_longformer.modeling.input_checks import check_indices

GLOBAL_TOKENS = ("none", "first", "question", "after_separator")
IGNORED_LABEL = -100
# What the tokenizer or the data set may bring beside the tensors.
LABEL_NAMES = ("label", "labels", "label_ids")
SPAN_NAMES = ("start_positions", "end_positions")


class GlobalAttentionCollator:
    """Pads a batch as Transformers does and adds `global_attention_mask`.

    A model marks global tokens itself as `config.default_global_tokens` says: this is for those who
    want others, and who will give the same mask where the model is used. The values are checked
    here, on the CPU: the model itself never waits for its device to look at them.

    Args:
        tokenizer: Gives the padding id and side, and the separator.
        collator: A data collator of Transformers for this tokenizer. None: padding, for labels of
            whole sequences (of any kind), of every token, and for multiple choice.
        global_tokens: The tokens that get global attention: "first" (the first one, for
            classification), "question" (those before the first separator), "after_separator" or
            "none". Examples that have a `global_attention_mask` of their own keep it.
        vocab_size: Token ids must be smaller; by default the size of the tokenizer.
        num_labels: Labels must be smaller; by default they are not checked against a limit.
        max_length: Longest sequence that is allowed, for example `config.max_sequence_length`.
        pad_to_multiple_of: Pad further, to a multiple of this many tokens.

    Raises:
        ValueError: A setting, or a value of an example, is not allowed; the message names it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]] | None = None,
        *,
        global_tokens: str = "first",
        vocab_size: int | None = None,
        num_labels: int | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        if global_tokens not in GLOBAL_TOKENS:
            allowed = ", ".join(map(repr, GLOBAL_TOKENS))
            raise ValueError(f"global_tokens is {global_tokens!r}, allowed are {allowed}")
        if tokenizer.pad_token_id is None:
            raise ValueError("tokenizer has no pad_token, which padding a batch needs")
        self.tokenizer = tokenizer
        self.collator = collator
        self.global_tokens = global_tokens
        self.vocab_size = vocab_size or len(tokenizer)
        self.num_labels = num_labels
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of tokenized examples.

        Args:
            examples: `input_ids` (a list for each choice in multiple choice), and optionally
                `attention_mask`, `token_type_ids`, `global_attention_mask` and a label; or the
                `start_positions` and `end_positions` of an answer, counted in the example's own
                tokens.

        Returns:
            Tensors [batch, length] or [batch, choices, length]; `labels` is [batch], [batch,
            labels] or [batch, length] (padded with -100), the positions are [batch].
        """
        if not examples:
            raise ValueError("the batch is empty, at least one example is needed")
        rows = [dict(example) for example in examples]
        masks = [row.pop("global_attention_mask", None) for row in rows]
        batch = dict((self.collator or self._pad)(rows))
        input_ids = batch["input_ids"]
        valid = batch.setdefault("attention_mask", torch.ones_like(input_ids))
        self._check(batch)
        for name in SPAN_NAMES:
            if name in batch and self.tokenizer.padding_side == "left":
                batch[name] = batch[name] + (valid == 0).sum(dim=-1)
        if masks[0] is None:
            batch["global_attention_mask"] = self._marked(batch)
        else:
            batch["global_attention_mask"] = self._aligned(masks, input_ids, 0)
        return batch

    def _pad(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Sequences, or the choices of every row, with labels of any kind."""
        name = next((name for name in LABEL_NAMES if name in rows[0]), None)
        labels = None if name is None else [row.pop(name) for row in rows]
        input_ids = rows[0]["input_ids"]
        has_choices = np.ndim(input_ids[:1]) == 2
        if has_choices:
            choices = range(len(input_ids))
            rows = [{name: row[name][i] for name in row} for row in rows for i in choices]
        pad = DataCollatorWithPadding(self.tokenizer, pad_to_multiple_of=self.pad_to_multiple_of)
        batch = dict(pad(rows))
        if has_choices:
            batch = {name: batch[name].unflatten(0, (-1, len(choices))) for name in batch}
        if labels is not None:
            first = np.asarray(labels[0])
            is_of_tokens = first.shape == (len(input_ids),) and not has_choices
            if is_of_tokens and first.dtype.kind in "iu":
                batch["labels"] = self._aligned(labels, batch["input_ids"], IGNORED_LABEL)
            else:
                batch["labels"] = torch.tensor(np.asarray(labels).tolist())
        return batch

    def _aligned(self, rows: list, input_ids: torch.Tensor, value: int) -> torch.Tensor:
        """What every token has one of, padded as the tokens are."""
        aligned = torch.full_like(input_ids, value)
        if input_ids.ndim == 3:
            rows = [choice for row in rows for choice in row]
        for slots, row in zip(aligned.flatten(0, -2), rows, strict=True):
            start = len(slots) - len(row) if self.tokenizer.padding_side == "left" else 0
            slots[start : start + len(row)] = torch.as_tensor(row)
        return aligned

    def _marked(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        names = [name for name in ("input_ids", "token_type_ids") if name in batch]
        valid, separator = batch["attention_mask"].bool(), self.tokenizer.sep_token_id
        mask = default_global_mask(
            self.global_tokens,
            valid.flatten(0, -2),
            sep_token_id=cast(int | None, separator),
            **{name: batch[name].flatten(0, -2) for name in names},
        )
        return valid.long() * 0 if mask is None else mask.long().view_as(valid)

    def _check(self, batch: Mapping[str, torch.Tensor]) -> None:
        lengths, labels = batch["attention_mask"].sum(dim=-1), batch.get("labels")
        longest = self.max_length or batch["input_ids"].shape[-1]
        for index, (input_ids, length) in enumerate(zip(batch["input_ids"], lengths)):
            place = f"of example {index}"
            if length.min() < 1 or length.max() > longest:
                raise ValueError(
                    f"input_ids {place} has {int(length.max())} tokens, 1 to max_length = {longest}"
                    " are allowed: truncate it, or convert the model with more positions"
                )
            check_indices(f"input_ids {place}", input_ids, self.vocab_size, "vocab_size", True)
            for name in SPAN_NAMES:
                if name in batch:
                    slot = batch[name][index, None]
                    check_indices(f"{name} {place}", slot, int(length), "its tokens", True)
            if self.num_labels and labels is not None and not labels.is_floating_point():
                label = labels[index][labels[index] != IGNORED_LABEL]
                check_indices(f"label {place}", label, self.num_labels, "num_labels", True)
