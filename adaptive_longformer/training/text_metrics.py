"""Metrics of generated text, computed here and with rouge_score: nothing is downloaded."""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# The end of a sentence: its mark, perhaps a closing quote or bracket, then white space.
_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+")
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def answer_metrics(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Exact match and F1 over words as SQuAD defines them, the best over each question's
    references.

    Case, punctuation, articles and runs of white space do not count. Source: Rajpurkar et al. 2016,
    section 6.1.

    Args:
        predictions: one answer per question.
        references: for each question at least one right answer.

    Returns:
        "exact_match" and "f1", means over the questions, from 0 to 100.

    Raises:
        ValueError: there are no questions, their numbers differ, or a question has no reference.
    """
    _check(predictions, references)
    exact = f1 = 0.0
    for prediction, answers in zip(predictions, references):
        exact += max(_normalized(prediction) == _normalized(answer) for answer in answers)
        f1 += max(_word_f1(prediction, answer) for answer in answers)
    return {"exact_match": 100 * exact / len(predictions), "f1": 100 * f1 / len(predictions)}


def rouge_metrics(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """ROUGE-1, -2, -L and -Lsum (F measures with stemming), the best over each text's references.

    For Lsum sentences are told apart by their marks, without a downloaded model. Source: Lin 2004,
    as implemented by rouge_score.

    Args:
        predictions: one text per document.
        references: for each document at least one summary.

    Returns:
        "rouge1", "rouge2", "rougeL" and "rougeLsum", means over the documents, from 0 to 100.

    Raises:
        ValueError: there are no texts, their numbers differ, or a text has no reference.
        ImportError: rouge_score is not installed.
    """
    _check(predictions, references)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE needs rouge_score: pip install rouge_score") from error
    scorer = RougeScorer(ROUGE, use_stemmer=True)
    totals = dict.fromkeys(ROUGE, 0.0)
    for prediction, summaries in zip(predictions, references):
        targets = [_one_per_line(summary) for summary in summaries]
        best = scorer.score_multi(targets, _one_per_line(prediction))
        for name in ROUGE:
            totals[name] += best[name].fmeasure
    return {name: 100 * total / len(predictions) for name, total in totals.items()}


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, by their marks; lines end sentences too."""
    lines = (line.strip() for line in text.splitlines())
    return [part for line in lines if line for part in _SENTENCE_END.split(line) if part]


def _one_per_line(text: str) -> str:
    return "\n".join(split_sentences(text))


def _normalized(text: str) -> str:
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def _word_f1(prediction: str, reference: str) -> float:
    found, expected = _normalized(prediction).split(), _normalized(reference).split()
    if not found or not expected:
        return float(found == expected)
    common = sum((Counter(found) & Counter(expected)).values())
    return 2 * common / (len(found) + len(expected))


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"there are {len(predictions)} predictions and {len(references)} lists of references; "
            "the same number, at least one, is needed"
        )
    for index, answers in enumerate(references):
        if isinstance(answers, str) or not answers:
            raise ValueError(f"references[{index}] is {answers!r}, a list of texts is needed")
