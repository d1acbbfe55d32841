"""A data collator from texts to the tensors of an encoder-decoder."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from adaptive_longformer.training.document_pairs import DocumentPair


class TextToTextCollator:
    """Tokenizes documents when they are needed.

    The input is the query (if there is one) and then as much of the document as fits. A document of
    a hundred pages is tokenized in a moment, and nothing is stored. Which tokens are global is left
    to `config.default_global_tokens`, as where the model is used.

    Args:
        tokenizer: of the model.
        max_length: tokens read per document, the query included.
        max_target_length: tokens of a target.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, max_target_length: int
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_target_length = max_target_length
        self._pad = DataCollatorForSeq2Seq(tokenizer)

    def __call__(self, pairs: Sequence[DocumentPair]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Returns:
            int64 tensors [batch, length]: `input_ids`, `attention_mask`, and `labels` [batch,
            target_length], padded with -100.
        """
        return dict(self._pad([self._encode(pair) for pair in pairs]))

    def _encode(self, pair: DocumentPair) -> dict[str, Any]:
        query, document = pair["query"], pair["document"]
        encoded = self.tokenizer(
            query or document,
            document if query else None,
            truncation="only_second" if query else True,
            max_length=self.max_length,
            return_token_type_ids=False,
        )
        target = self.tokenizer(
            text_target=pair["targets"][0], truncation=True, max_length=self.max_target_length
        )
        return {**encoded, "labels": target["input_ids"]}

    def coverage(self, pairs: Sequence[DocumentPair]) -> float:
        """The part of all documents' tokens that is read, 0 to 1."""
        read: dict[str, tuple[int, int]] = {}
        for pair in pairs:
            if pair["document"] not in read:
                total = len(self.tokenizer(pair["document"], verbose=False)["input_ids"])
                read[pair["document"]] = (min(total, self.max_length), total)
        return sum(part for part, _ in read.values()) / sum(total for _, total in read.values())
