import evaluate
import pytest

from adaptive_longformer.training.text_metrics import (
    AnswerMetric,
    RougeMetric,
    split_sentences,
)


def answer_metrics(predictions, references):
    return AnswerMetric().compute(predictions=predictions, references=references)


def rouge_metrics(predictions, references):
    return RougeMetric().compute(predictions=predictions, references=references)


def test_answers_are_compared_without_case_articles_and_punctuation():
    assert answer_metrics(["The  Eiffel Tower!"], [["eiffel tower"]]) == {
        "exact_match": 100.0,
        "f1": 100.0,
    }


def test_the_best_reference_counts():
    # "blue sky today" against "the sky": one common word of three and one -> 2 * 1 / 4.
    scores = answer_metrics(["blue sky today", "no"], [["red", "the sky"], ["yes"]])
    assert scores == {"exact_match": 0.0, "f1": 25.0}


def test_an_empty_answer_is_right_only_if_empty_is_right():
    assert answer_metrics(["", ""], [["word"], ["the"]]) == {"exact_match": 50.0, "f1": 50.0}


def test_rouge_of_hand_counted_texts():
    # 3 of 4 words, 2 of 3 pairs of words; the longest common subsequence has 3 words.
    scores = rouge_metrics(["dogs run home fast"], [["dogs run home slowly"]])
    assert scores["rouge1"] == pytest.approx(75.0)
    assert scores["rouge2"] == pytest.approx(100 * 2 / 3)
    assert scores["rougeL"] == pytest.approx(75.0)


def test_rouge_lsum_reads_sentences_in_any_order():
    swapped = rouge_metrics(["Birds sing. Dogs bark."], [["Dogs bark. Birds sing."]])
    assert swapped["rougeLsum"] == pytest.approx(100.0)
    assert swapped["rougeL"] == pytest.approx(50.0)


def test_sentences_end_at_marks_and_lines():
    assert split_sentences('He said "no." Then left!\nVersion 2.5 works? Yes') == [
        'He said "no."',
        "Then left!",
        "Version 2.5 works?",
        "Yes",
    ]
    assert split_sentences("  \n ") == []


@pytest.mark.parametrize(
    "predictions, references, word",
    [
        ([], [], "a prediction"),
        (["a"], [["a"], ["b"]], "Mismatch in the number of predictions"),
        (["a"], [[]], "at least one reference"),
    ],
)
@pytest.mark.parametrize("metrics", [answer_metrics, rouge_metrics])
def test_bad_arguments_are_named(metrics, predictions, references, word):
    with pytest.raises(ValueError, match=word):
        metrics(predictions, references)


def test_batches_are_gathered_and_nothing_is_stored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "cache"))
    metric = AnswerMetric()
    metric.add_batch(predictions=["yes"], references=[["yes", "yeah"]])
    metric.add(prediction="no", reference=["yes"])
    assert metric.compute() == {"exact_match": 50.0, "f1": 50.0}
    assert evaluate.combine([metric]).compute(predictions=["yes"], references=[["yes"]]) == {
        "exact_match": 100.0,
        "f1": 100.0,
    }
    assert list(tmp_path.iterdir()) == []
