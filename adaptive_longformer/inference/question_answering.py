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
from adaptive_longformer.inference.summarization import generation_options
from adaptive_longformer.modeling.modeling_adaptive_sparse_seq2seq import (
    AdaptiveSparseForConditionalGeneration,
)

# Two pieces of a long document share so many tokens, more than an answer has.
_STRIDE = 128
_MAX_ANSWER_TOKENS = 30


@dataclass(frozen=True)
class Answer:
    """An answer from a document.

    Attributes:
        text: the answer.
        start, end: where it is, as characters: `document[start:end]`. Of an answer that a model
            wrote in its own words, the part of the document that it had read.
        score: the higher, the better: the sum of the logits of the first and last token, or the
            mean log-likelihood of the tokens that were written.
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
    max_answer_tokens: int | None = None,
    max_length: int | None = None,
    stride: int = _STRIDE,
    progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """The best answers to a question about a document, the best one first.

    A question answering head finds spans of the document, an encoder-decoder that was trained for
    it writes in its own words. A document that does not fit is read in overlapping pieces, and the
    best answers of all pieces are taken.

    Args:
        model: with a question answering head, or an encoder-decoder that generates; it is used as
            it is, on its device.
        tokenizer: a fast tokenizer, which knows the characters of a token.
        question: what is asked.
        document: where the answer is.
        num_answers: how many, none of which overlap or are the same; fewer if there are not so
            many.
        max_answer_tokens: longest answer. None: 30, or what a checkpoint's generation settings say.
        max_length: tokens per piece, with the question; None: as many as the model reads.
        stride: tokens that two pieces share, at most half of what a piece has of the document.
        progress: called with the pieces that are done, and how many there are.

    Raises:
        ValueError: an argument is empty, out of range, the model is of another kind, or the
            question leaves less than an eighth of a piece for the document.
    """
    for name, number in (("num_answers", num_answers), ("max_answer_tokens", max_answer_tokens)):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}, a whole number >= 1 is needed")
    is_writing = isinstance(model, AdaptiveSparseForConditionalGeneration)
    capacity = _capacity(model, is_writing)
    if max_length is not None and not 1 <= max_length <= capacity:
        raise ValueError(
            f"max_length is {max_length}, 1 to the model's {capacity} tokens is allowed"
        )
    pieces = _pieces(tokenizer, question, document, max_length or capacity, stride)
    was_training = model.training
    model.eval()
    found: list[Answer] = []
    try:
        for piece in range(len(pieces["input_ids"])):
            if is_writing:
                found += _written(model, tokenizer, pieces, piece, num_answers, max_answer_tokens)
            else:
                longest = max_answer_tokens or _MAX_ANSWER_TOKENS
                spans = _best_spans(model, pieces, piece, 4 * num_answers, longest)
                found += [Answer(document[start:end], start, end, s) for s, start, end in spans]
            if progress is not None:
                progress(piece + 1, len(pieces["input_ids"]))
    finally:
        model.train(was_training)
    answers: list[Answer] = []
    for new in sorted(found, key=lambda answer: -answer.score):
        if is_writing:
            is_new = all(new.text != old.text for old in answers)
        else:
            is_new = all(new.end <= old.start or old.end <= new.start for old in answers)
        if is_new and len(answers) < num_answers:
            answers.append(new)
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
    room, least = max_length - with_question, max(1, max_length // 8)
    if room < least:
        raise ValueError(
            f"question has {with_question} tokens with the separators, at least {least} of "
            f"{max_length} must be left for the document"
        )
    return tokenizer(
        question,
        document,
        truncation="only_second",
        max_length=max_length,
        stride=min(stride, room // 2),  # so that every piece brings something new
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )


def _capacity(model: PreTrainedModel, is_writing: bool) -> int:
    """How many tokens the model reads at once; with both halves if it looks for spans with both."""
    config: Any = model.config
    if not isinstance(config, (AdaptiveSparseConfig, AdaptiveSparseSeq2SeqConfig)):
        raise ValueError(
            f"model is a {config.model_type} model, one of ours with a question answering head is "
            "needed: adaptive-longformer convert SOURCE TARGET makes one of it"
        )
    if not is_writing and not type(model).__name__.endswith("ForQuestionAnswering"):
        raise ValueError(
            f"model is a {type(model).__name__}, which answers no questions: load it by "
            "AutoModelForQuestionAnswering or AutoModelForSeq2SeqLM, as it was trained to answer"
        )
    capacity: int = config.max_sequence_length
    if config.is_encoder_decoder and not is_writing:
        capacity = min(capacity, config.max_decoder_position_embeddings)
    return capacity


def _inputs(pieces: Any, piece: int, device: torch.device) -> dict[str, torch.Tensor]:
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in pieces]
    return {name: torch.tensor([pieces[name][piece]], device=device) for name in names}


def _document_places(pieces: Any, piece: int) -> list[tuple[int, int] | None]:
    """The characters of each token of the document; None for the others."""
    return [
        place if part == 1 and place[1] > place[0] else None
        for part, place in zip(pieces.sequence_ids(piece), pieces["offset_mapping"][piece])
    ]


@torch.no_grad()
def _written(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    pieces: Any,
    piece: int,
    count: int,
    max_answer_tokens: int | None,
) -> list[Answer]:
    """What an encoder-decoder writes about one piece."""
    places = [place for place in _document_places(pieces, piece) if place is not None]
    if not places:
        return []
    inputs = _inputs(pieces, piece, model.device)
    inputs.pop("token_type_ids", None)
    if max_answer_tokens is not None:
        max_answer_tokens = min(max_answer_tokens, model.config.max_decoder_position_embeddings)
    output = model.generate(
        **inputs,
        **generation_options(model, max_answer_tokens, {}, {}, _MAX_ANSWER_TOKENS),
        num_beams=max(count, model.generation_config.num_beams or 1),
        num_return_sequences=count,
        return_dict_in_generate=True,
        output_scores=True,
    )
    scores = model.compute_transition_scores(
        output.sequences, output.scores, output.get("beam_indices"), normalize_logits=True
    )
    means = scores.sum(dim=1) / (scores != 0).sum(dim=1).clamp(min=1)
    texts = tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
    return [
        Answer(text.strip(), places[0][0], places[-1][1], score)
        for text, score in zip(texts, means.tolist())
    ]


@torch.no_grad()
def _best_spans(
    model: PreTrainedModel, pieces: Any, piece: int, count: int, max_answer_tokens: int
) -> list[tuple[float, int, int]]:
    """Score, first and last character of the best spans of one piece."""
    output = model(**_inputs(pieces, piece, model.device))
    offsets = pieces["offset_mapping"][piece]
    is_document = torch.tensor([place is not None for place in _document_places(pieces, piece)])
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
