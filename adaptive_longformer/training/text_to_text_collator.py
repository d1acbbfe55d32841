"""A data collator from texts to the tensors of an encoder-decoder."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from adaptive_longformer.training.collator import IGNORED_LABEL, GlobalAttentionCollator
from adaptive_longformer.training.document_pairs import DocumentPair


class TextToTextCollator:
    """Tokenizes documents when they are needed, and marks their global tokens.

    The input is the query (if there is one) and then as much of the document as fits; the query's
    tokens are global, without a query the first token is. A document of a hundred pages is
    tokenized in a moment, and nothing is stored.

    Args:
        tokenizer: of the model.
        max_length: tokens read per document, the query included.
        max_target_length: tokens of a target.
        vocab_size: token ids must be smaller; by default the size of the tokenizer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        max_target_length: int,
        vocab_size: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_target_length = max_target_length
        options: dict[str, Any] = {"vocab_size": vocab_size, "max_length": max_length}
        self._pad = {
            has_query: GlobalAttentionCollator(
                tokenizer, global_tokens="question" if has_query else "first", **options
            )
            for has_query in (True, False)
        }

    def __call__(self, pairs: Sequence[DocumentPair]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Returns:
            int64 tensors [batch, length]: `input_ids`, `attention_mask`, `global_attention_mask`,
            and `labels` [batch, target_length], padded with -100.
        """
        has_query = any(pair["query"] for pair in pairs)
        batch = self._pad[has_query]([self.encode(pair) for pair in pairs])
        batch.pop("token_type_ids", None)
        targets = self.tokenizer(
            text_target=[pair["targets"][0] for pair in pairs],
            truncation=True,
            max_length=self.max_target_length,
        )["input_ids"]
        labels = torch.full((len(pairs), max(map(len, targets))), IGNORED_LABEL)
        for row, target in enumerate(targets):
            labels[row, : len(target)] = torch.tensor(target)
        return {**batch, "labels": labels}

    def encode(self, pair: DocumentPair) -> Mapping[str, Any]:
        """The tokens of a query and its document, cut at `max_length`."""
        if pair["query"]:
            return self.tokenizer(
                pair["query"],
                pair["document"],
                truncation="only_second",
                max_length=self.max_length,
            )
        return self.tokenizer(pair["document"], truncation=True, max_length=self.max_length)

    def coverage(self, pairs: Sequence[DocumentPair]) -> float:
        """The part of all documents' tokens that is read, 0 to 1."""
        read: dict[str, tuple[int, int]] = {}
        for pair in pairs:
            if pair["document"] not in read:
                total = len(self.tokenizer(pair["document"], verbose=False)["input_ids"])
                read[pair["document"]] = (min(total, self.max_length), total)
        return sum(part for part, _ in read.values()) / sum(total for _, total in read.values())
