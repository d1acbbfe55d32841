"""Finding the answer to a question in a document of any length."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaptive_longformer.configuration.configuration_adaptive_sparse import AdaptiveSparseConfig
from adaptive_longformer.configuration.configuration_adaptive_sparse_seq2seq import (
    AdaptiveSparseSeq2SeqConfig,
)

# Two pieces of a long document share so many tokens, more than an answer has.
_STRIDE = 128


@dataclass(frozen=True)
class Answer:
    """A span of a document.

    Attributes:
        text: the span.
        start, end: where it is, as characters: `document[start:end]`.
        score: the sum of the logits of its first and last token; the higher, the better.
    """

    text: str
    start: int
    end: int
    score: float


def answer_question(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    document: str,
    *,
    num_answers: int = 1,
    max_answer_tokens: int = 30,
    max_length: int | None = None,
    stride: int = _STRIDE,
    progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """The best spans of a document as answers to a question, the best one first.

    The question's tokens are global: every part of the document sees them and they see it. A
    document that does not fit is read in overlapping pieces, and the best spans of all pieces are
    taken.

    Args:
        model: with a question answering head; it is used as it is, on its device.
        tokenizer: a fast tokenizer, which knows the characters of a token.
        question: what is asked.
        document: where the answer is.
        num_answers: how many spans, none of which overlap; fewer if there are not so many.
        max_answer_tokens: longest answer.
        max_length: tokens per piece, with the question; None: as many as the model reads.
        stride: tokens that two pieces share.
        progress: called with the pieces that are done, and how many there are.

    Raises:
        ValueError: an argument is empty, out of range, the model is of another kind, or the
            question leaves no room for the document.
    """
    for name, number in (("num_answers", num_answers), ("max_answer_tokens", max_answer_tokens)):
        if number < 1:
            raise ValueError(f"{name} is {number}, a whole number >= 1 is needed")
    capacity = _capacity(model)
    if max_length is not None and not 1 <= max_length <= capacity:
        raise ValueError(
            f"max_length is {max_length}, 1 to the model's {capacity} tokens is allowed"
        )
    pieces = _pieces(tokenizer, question, document, max_length or capacity, stride)
    was_training = model.training
    model.eval()
    found: list[tuple[float, int, int]] = []
    try:
        for piece in range(len(pieces["input_ids"])):
            found += _best_spans(model, pieces, piece, 4 * num_answers, max_answer_tokens)
            if progress is not None:
                progress(piece + 1, len(pieces["input_ids"]))
    finally:
        model.train(was_training)
    answers: list[Answer] = []
    for score, start, end in sorted(found, key=lambda span: -span[0]):
        if all(end <= other.start or start >= other.end for other in answers):
            answers.append(Answer(document[start:end], start, end, score))
        if len(answers) == num_answers:
            break
    return answers


def _pieces(
    tokenizer: PreTrainedTokenizerBase, question: str, document: str, max_length: int, stride: int
) -> Any:
    """The tokens of the question with each piece of the document, and which characters they are."""
    for name, text in (("question", question), ("document", document)):
        if not text.strip():
            raise ValueError(f"{name} is empty, a text is needed")
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer is a {type(tokenizer).__name__}, a fast one is needed: it knows which "
            "characters a token is made of"
        )
    # Not with an empty document, which a tokenizer may take for none.
    some_document = len(tokenizer("a", add_special_tokens=False)["input_ids"])
    with_question = len(tokenizer(question, "a")["input_ids"]) - some_document
    room = max_length - with_question
    if room < 1:
        raise ValueError(
            f"question has {with_question} tokens with the separators, at least one of "
            f"{max_length} must be left for the document"
        )
    return tokenizer(
        question,
        document,
        truncation="only_second",
        max_length=max_length,
        stride=min(stride, room - 1),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )


def _capacity(model: PreTrainedModel) -> int:
    """How many tokens the model reads at once; an encoder-decoder reads a piece with both."""
    config: Any = model.config
    if not isinstance(config, (AdaptiveSparseConfig, AdaptiveSparseSeq2SeqConfig)):
        raise ValueError(
            f"model is a {config.model_type} model, one of ours with a question answering head is "
            "needed: adaptive-longformer convert SOURCE TARGET makes one of it"
        )
    capacity: int = config.max_sequence_length
    if config.is_encoder_decoder:
        capacity = min(capacity, config.max_decoder_position_embeddings)
    return capacity


@torch.no_grad()
def _best_spans(
    model: PreTrainedModel, pieces: Any, piece: int, count: int, max_answer_tokens: int
) -> list[tuple[float, int, int]]:
    """Score, first and last character of the best spans of one piece."""
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in pieces]
    inputs = {name: torch.tensor([pieces[name][piece]], device=model.device) for name in names}
    output = model(**inputs)
    offsets = pieces["offset_mapping"][piece]
    is_document = torch.tensor(
        [
            part == 1 and end > start
            for part, (start, end) in zip(pieces.sequence_ids(piece), offsets)
        ]
    )
    start_logits, end_logits = (
        logits[0].float().cpu().masked_fill(~is_document, -torch.inf)
        for logits in (output.start_logits, output.end_logits)
    )
    max_answer_tokens = min(max_answer_tokens, len(offsets))
    # scores[i, j]: the answer from token i to token i + j.
    padded = torch.nn.functional.pad(end_logits, (0, max_answer_tokens - 1), value=-torch.inf)
    scores = start_logits[:, None] + padded.unfold(0, max_answer_tokens, 1)
    best = scores.flatten().topk(min(count, scores.numel()))
    spans = []
    for score, index in zip(best.values.tolist(), best.indices.tolist()):
        first, more = divmod(index, max_answer_tokens)
        if score > -float("inf"):
            spans.append((score, offsets[first][0], offsets[first + more][1]))
    return spans
