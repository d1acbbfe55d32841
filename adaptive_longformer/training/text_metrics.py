"""Metrics of generated text, for evaluate: nothing is downloaded or stored."""

import re
import string
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Features, List, Value
from evaluate import Metric, MetricInfo
from transformers import EvalPrediction, PreTrainedTokenizerBase

from adaptive_longformer.training.document_pairs import DocumentPair

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# The end of a sentence: its mark, perhaps a closing quote or bracket, then white space.
_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+")
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class _TextMetric(Metric):
    """Means over texts, from 0 to 100; of each the best over its references counts.

    `compute(predictions=..., references=...)` takes one text and one list of right texts each, and
    raises ValueError where there are none.
    """

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _build_data_dir(self) -> str:
        return ""  # in which evaluate would make folders, even for what is kept in memory

    def _info(self) -> MetricInfo:
        columns = {"predictions": Value("string"), "references": List(Value("string"))}
        description = self.__doc__ or ""
        return MetricInfo(description, citation="", features=Features(columns))

    def _compute(
        self, *, predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, float]:
        if not predictions or not all(references):
            raise ValueError("a prediction, and at least one reference for each one, is needed")
        scores = [self.best(*pair) for pair in zip(predictions, references, strict=True)]
        return {name: 100 * sum(s[name] for s in scores) / len(scores) for name in scores[0]}

    @abstractmethod
    def best(self, prediction: str, references: Sequence[str]) -> dict[str, float]:
        """The scores of one text, from 0 to 1."""


class AnswerMetric(_TextMetric):
    """Exact match and F1 over words as SQuAD defines them.

    Case, punctuation, articles and runs of white space do not count. Source: Rajpurkar et al. 2016,
    section 6.1.
    """

    def best(self, prediction: str, references: Sequence[str]) -> dict[str, float]:
        return {
            "exact_match": max(_normalized(prediction) == _normalized(r) for r in references),
            "f1": max(_word_f1(prediction, reference) for reference in references),
        }


class RougeMetric(_TextMetric):
    """ROUGE-1, -2, -L and -Lsum (F measures with stemming).

    For Lsum sentences are told apart by their marks, without a downloaded model. Source: Lin 2004,
    as implemented by rouge_score.

    Raises:
        ImportError: rouge_score is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise ImportError("ROUGE needs rouge_score: pip install rouge_score") from error
        self._scorer = RougeScorer(ROUGE, use_stemmer=True)

    def best(self, prediction: str, references: Sequence[str]) -> dict[str, float]:
        targets = [_one_per_line(summary) for summary in references]
        scores = self._scorer.score_multi(targets, _one_per_line(prediction))
        return {name: scores[name].fmeasure for name in ROUGE}


class TextsMetric:
    """A metric of texts for `Seq2SeqTrainer(compute_metrics=...)`, of tokens that were generated.

    Args:
        metric: of the texts.
        tokenizer: that decodes them.
        pairs: of the data set that is evaluated, in its order.
    """

    def __init__(
        self,
        metric: _TextMetric,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Sequence[DocumentPair],
    ) -> None:
        self.metric = metric
        self.tokenizer = tokenizer
        self.references = [pair["targets"] for pair in pairs]

    def texts(self, token_ids: np.ndarray) -> list[str]:
        """The generated texts; -100, which fills up, is left out."""
        padding: Any = self.tokenizer.pad_token_id
        token_ids = np.where(token_ids < 0, padding, token_ids)
        return self.tokenizer.batch_decode(token_ids, skip_special_tokens=True)

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        texts = self.texts(np.asarray(prediction.predictions))
        found = self.metric.compute(predictions=texts, references=self.references)
        assert found is not None
        return found


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
