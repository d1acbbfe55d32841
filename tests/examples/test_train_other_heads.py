"""The examples for language models, token classification and multiple choice, on one small base."""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMultipleChoice, AutoTokenizer, pipeline

from adaptive_longformer.training.small_longformer import (
    train_byte_level_tokenizer,
    write_small_longformer,
)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WORDS = [
    *[
        "the",
        "council",
        "met",
        "in",
        "March",
        "and",
        "Ada",
        "spoke",
        "about",
        "Leeds",
        "for",
        "an",
        "hour",
    ]
]
NAMES = {"March": "date", "Ada": "person", "Leeds": "place"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Longformer that reads 64 tokens."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_byte_level_tokenizer([" ".join(WORDS)] * 9, vocab_size=400, max_length=64)
    write_small_longformer(folder, tokenizer, ["a", "b"], max_length=64)
    return folder


@pytest.fixture
def run(base, tmp_path):
    """Runs a script on rows to train and others to evaluate and test on."""

    def run(script, train, test, *more):
        for name, rows in (("train", train), ("test", test)):
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        held_out = str(tmp_path / "test.jsonl")
        words = ["--model", str(base), "--data-file", str(tmp_path / "train.jsonl")]
        words += ["--eval-file", held_out, "--test-file", held_out, "--output", str(tmp_path)]
        words += ["--batch-size", "4", "--learning-rate", "2e-3", "--cpu", *more]
        return runpy.run_path(str(EXAMPLES / script))["main"](words)

    return run


def written(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def rotated(count):
    """Sentences of the same words, each beginning with another one."""
    return [WORDS[i % 13 :] + WORDS[: i % 13] for i in range(count)]


def test_a_language_model_learns_to_read_longer_texts(run, tmp_path):
    train = [{"text": " ".join(words * 6)} for words in rotated(13)]
    result = run(
        "train_masked_language_model.py", train, train[:3], "--max-length", "96", "--streaming",
        "--max-steps", "40", "--train-sampling-strategy", "random",
    )  # fmt: skip
    assert result["test_perplexity"] == pytest.approx(math.exp(result["test_loss"]))
    assert result["test_perplexity"] < 50  # 400 of a model that knows nothing
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["max_position_embeddings"] >= 96
    fill = pipeline("fill-mask", model=str(tmp_path), device="cpu")
    assert len(fill("the <mask> met in March", top_k=3)) == 3
    assert fill.tokenizer.model_max_length == 96


def test_words_are_named_as_the_pipeline_names_them(run, tmp_path):
    rows = [
        {"tokens": words, "tags": [NAMES.get(word, "none") for word in words]}
        for words in rotated(26)
    ]
    rows[0]["tokens"], rows[0]["tags"] = rows[0]["tokens"] * 9, rows[0]["tags"] * 9  # too long
    result = run(
        "finetune_token_classification.py", rows, rows[:5], "--epochs", "4", "--max-length", "64"
    )
    assert result["test_accuracy"] > 0.9
    found = written(tmp_path)
    read = len(found[0]["tags"])
    assert 13 < read < 13 * 9
    right = [
        tag == wanted
        for row, wanted_row in zip(found, rows)
        for tag, wanted in zip(row["tags"], wanted_row["tags"])
    ]
    assert sum(right) / len(right) == pytest.approx(result["test_accuracy"])
    name = pipeline("token-classification", model=str(tmp_path), device="cpu")
    tagged = {token["start"]: token["entity"] for token in name(" ".join(rows[3]["tokens"]))}
    starts = [sum(len(word) + 1 for word in rows[3]["tokens"][:i]) for i in range(13)]
    # A token begins with its word, or with the space before it.
    assert [tagged.get(s, tagged.get(s - 1)) for s in starts] == found[3]["tags"]


def test_an_answer_is_chosen_as_the_saved_model_chooses_it(run, tmp_path):
    choices = ["a date", "a person", "a place"]
    rows = [
        {
            "document": " ".join(words * 9),  # cut, so that the choices are not
            "question": f"what is {word}",
            "choices": choices,
            "answer": choices.index(f"a {name}"),
        }
        for words in rotated(6)
        for word, name in NAMES.items()
    ]
    result = run(
        "finetune_multiple_choice.py", rows, rows[:6], "--epochs", "1", "--num-choices", "3",
        "--max-length", "64",
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForMultipleChoice.from_pretrained(tmp_path).eval()
    found = written(tmp_path)
    for row, prediction in zip(rows, found):
        asked = [f"{row['question']} {choice}" for choice in choices]
        batch = tokenizer(
            [row["document"]] * 3, asked, truncation="only_first", return_tensors="pt", padding=True
        )
        with torch.no_grad():
            logits = model(**{name: value[None] for name, value in batch.items()}).logits[0]
        assert prediction["scores"] == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)
        assert prediction["answer"] == int(logits.argmax())
    right = [prediction["answer"] == row["answer"] for row, prediction in zip(rows, found)]
    assert sum(right) / 6 == pytest.approx(result["test_accuracy"])


@pytest.mark.parametrize(
    ("script", "row", "message"),
    [
        ("finetune_token_classification.py", {"tokens": ["a"], "tags": []}, "1 words"),
        ("finetune_token_classification.py", {"tokens": "a b", "tags": []}, "no list of words"),
        (
            "finetune_multiple_choice.py",
            {"document": "a", "question": "b", "choices": ["c"], "answer": 0},
            "a list of --num-choices = 4 is needed",
        ),
        (
            "finetune_multiple_choice.py",
            {"document": "a", "question": "b", "choices": [*"abcd"], "answer": 4},
            "has the answer 4",
        ),
    ],
)
def test_a_row_that_is_not_as_described_is_named(script, row, message, run):
    with pytest.raises(SystemExit, match=f"line 1.*{message}"):
        run(script, [row], [row])
