"""A data collator that pads, marks the global tokens, and checks what the model should not have to
check."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from adaptive_longformer.modeling.default_global_tokens import default_global_mask

GLOBAL_TOKENS = ("none", "first", "question", "after_separator")
IGNORED_LABEL = -100
# What the tokenizer or the data set may bring beside the tensors.
LABEL_NAMES = ("label", "labels", "label_ids")
SPAN_NAMES = ("start_positions", "end_positions")


class GlobalAttentionCollator:
    """Pads a batch to its longest sequence and adds `global_attention_mask`.

    The values are checked here, on the CPU and before the model: the model itself never waits for
    its device to look at them.

    Args:
        tokenizer: Gives the padding id and side, and the separator.
        global_tokens: The tokens that get global attention: "first" (the first one, for
            classification), "question" (those before the first separator), "after_separator" or
            "none". An example that has a `global_attention_mask` of its own keeps it.
        vocab_size: Token ids must be smaller; by default the size of the tokenizer. A model's table
            may be larger.
        num_labels: Labels must be smaller; by default they are not checked against a limit.
        max_length: Longest sequence that is allowed, for example `config.max_sequence_length`.
        pad_to_multiple_of: Pad further, to a multiple of this many tokens.

    Raises:
        ValueError: A setting, or a value of an example, is not allowed; the message names it and
            its place.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        global_tokens: str = "first",
        vocab_size: int | None = None,
        num_labels: int | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        if global_tokens not in GLOBAL_TOKENS:
            raise ValueError(
                f"global_tokens is {global_tokens!r}, allowed are "
                f"{', '.join(map(repr, GLOBAL_TOKENS))}"
            )
        if tokenizer.pad_token_id is None:
            raise ValueError("tokenizer has no pad_token, which padding a batch needs")
        self.tokenizer = tokenizer
        self.global_tokens = global_tokens
        self.vocab_size = vocab_size or len(tokenizer)
        self.num_labels = num_labels
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of tokenized examples.

        Args:
            examples: `input_ids`, and optionally `attention_mask`, `token_type_ids`,
                `global_attention_mask` and a
                label: one number, or one per token (padded with -100); or the `start_positions` and
                `end_positions` of an answer, counted in the example's own tokens.

        Returns:
            int64 tensors [batch, length]; `labels` is [batch] or [batch, length], the positions are
            [batch].
        """
        if not examples:
            raise ValueError("the batch is empty, at least one example is needed")
        for index, example in enumerate(examples):
            self._check_token_ids(index, example)
        length = max(len(example["input_ids"]) for example in examples)
        if self.pad_to_multiple_of:
            length += -length % self.pad_to_multiple_of

        padding = {
            "input_ids": self.tokenizer.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": self.tokenizer.pad_token_type_id,
            "global_attention_mask": 0,
        }
        batch = {}
        for name, value in padding.items():
            if name in examples[0]:
                rows = [self._row(name, example) for example in examples]
                batch[name] = self._pad(rows, value, length)
        if "attention_mask" not in batch:
            ones = [[1] * len(example["input_ids"]) for example in examples]
            batch["attention_mask"] = self._pad(ones, 0, length)
        if "global_attention_mask" not in batch:
            batch["global_attention_mask"] = self._global_attention_mask(batch)
        label_name = next((name for name in LABEL_NAMES if name in examples[0]), None)
        if label_name is not None:
            batch["labels"] = self._labels(label_name, examples, length)
        for name in SPAN_NAMES:
            if name in examples[0]:
                slots = [self._slot(name, *example, length) for example in enumerate(examples)]
                batch[name] = torch.tensor(slots)
        return batch

    def _check_token_ids(self, index: int, example: Mapping[str, Any]) -> None:
        input_ids = example["input_ids"]
        if len(input_ids) == 0:
            raise ValueError(f"input_ids of example {index} is empty, at least one token is needed")
        if self.max_length is not None and len(input_ids) > self.max_length:
            raise ValueError(
                f"input_ids of example {index} has {len(input_ids)} tokens, at most max_length = "
                f"{self.max_length} are allowed: truncate it, or convert the model with more "
                "positions"
            )
        for token_id in (min(input_ids), max(input_ids)):
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(
                    f"input_ids of example {index} has the token id {token_id}, "
                    f"0 <= id < vocab_size = {self.vocab_size} is needed"
                )

    def _row(self, name: str, example: Mapping[str, Any]) -> Sequence[int]:
        row, num_tokens = example[name], len(example["input_ids"])
        if len(row) != num_tokens:
            raise ValueError(
                f"{name} of an example has {len(row)} values, one for each of its {num_tokens} "
                "tokens is needed"
            )
        return row

    def _pad(self, rows: Sequence[Sequence[int]], value: int, length: int) -> torch.Tensor:
        padded = torch.full((len(rows), length), value, dtype=torch.int64)
        for index, row in enumerate(rows):
            start = length - len(row) if self.tokenizer.padding_side == "left" else 0
            padded[index, start : start + len(row)] = torch.as_tensor(row, dtype=torch.int64)
        return padded

    def _global_attention_mask(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        separator = self.tokenizer.sep_token_id
        assert separator is None or isinstance(separator, int)
        mask = default_global_mask(
            self.global_tokens,
            batch["attention_mask"].bool(),
            input_ids=batch["input_ids"],
            token_type_ids=batch.get("token_type_ids"),
            sep_token_id=separator,
        )
        return torch.zeros_like(batch["input_ids"]) if mask is None else mask.long()

    def _slot(self, name: str, index: int, example: Mapping[str, Any], length: int) -> int:
        """Where a token of an example is in the padded batch."""
        position, num_tokens = int(example[name]), len(example["input_ids"])
        if not 0 <= position < num_tokens:
            raise ValueError(
                f"{name} of example {index} is {position}, 0 <= {name} < its {num_tokens} tokens "
                "is needed"
            )
        is_left = self.tokenizer.padding_side == "left"
        return position + (length - num_tokens if is_left else 0)

    def _labels(
        self, name: str, examples: Sequence[Mapping[str, Any]], length: int
    ) -> torch.Tensor:
        if isinstance(examples[0][name], Sequence):
            labels = self._pad([self._row(name, e) for e in examples], IGNORED_LABEL, length)
        else:
            labels = torch.as_tensor([example[name] for example in examples])
        if labels.is_floating_point() or self.num_labels is None:
            return labels  # Regression, or no limit is known.
        wrong = (labels != IGNORED_LABEL) & ((labels < 0) | (labels >= self.num_labels))
        if wrong.any():
            index = int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"{name} of example {index} is {int(labels[wrong][0])}, 0 <= {name} < num_labels = "
                f"{self.num_labels} "
                "(or -100, which is ignored) is needed"
            )
        return labels
