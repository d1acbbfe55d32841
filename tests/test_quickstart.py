import json
from functools import partial

import pytest
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM

from adaptive_longformer import quickstart
from adaptive_longformer.training.small_longformer import train_byte_level_tokenizer
from adaptive_longformer_command_line import main


@pytest.fixture
def data(tmp_path):
    """Forty documents of two classes that differ in one word."""
    rows = [
        {"text": f"document {i} " + ("apple " if i % 2 else "pear ") * 60, "label": i % 2}
        for i in range(40)
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Fewer repeats and documents; the random state and the thread count stay as they are."""
    monkeypatch.setattr(quickstart, "time_both", partial(quickstart.time_both, repeats=1))
    smaller = partial(quickstart.cut_documents, train_per_class=2, test_per_class=1)
    monkeypatch.setattr(quickstart, "cut_documents", smaller)


def test_whole_way_on_own_data(tmp_path, data, capsys):
    output = tmp_path / "output"
    arguments = ["--data", data, "--output", str(output), "--max-length", "256", "--epochs", "1"]
    assert main(["quickstart", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "32 documents to train on and 8 held out, 2 classes" in printed
    for row in ("forward", "training step", "largest logit difference", "bag of words", "chance"):
        assert any(line.strip().startswith(row) for line in printed.splitlines()), row
    assert "50.0%" in printed  # chance
    model = AutoModelForSequenceClassification.from_pretrained(output / "fine-tuned")
    assert model.config.model_type == "adaptive_sparse"
    assert model.config.id2label == {0: "0", 1: "1"}
    # Nothing is overwritten.
    assert main(["quickstart", *arguments]) == 2
    assert "exists and is not empty; give a new folder" in capsys.readouterr().err


def test_a_bert_as_source_gets_longer_and_is_timed_on_what_it_can_read(tmp_path, data, capsys):
    tokenizer = train_byte_level_tokenizer(["document apple pear"], vocab_size=300)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=1,
    )
    source, output = tmp_path / "bert", tmp_path / "output"
    BertForMaskedLM(config).save_pretrained(source)
    tokenizer.save_pretrained(source)
    arguments = ["--source", str(source), "--data", data, "--output", str(output)]
    assert main(["quickstart", *arguments, "--max-length", "128", "--epochs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "timed both models on 2 documents of up to 64 tokens" in printed
    model = AutoModelForSequenceClassification.from_pretrained(output / "fine-tuned")
    assert model.config.max_sequence_length == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.csv"], "nowhere.csv is no file"),
        (["--source", "no-such-folder/x/y"], "source: "),
        (["--epochs", "0"], "--epochs is 0"),
        (["--max-length", "3"], "--max-length is 3"),
        (["--seed", "-1"], "--seed is -1"),
    ],
)
def test_a_mistake_ends_in_one_line_and_writes_nothing(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model_type", "words"),
    [("led", ["'led'", "encoder-decoder", "longformer"]), ("gpt2", ["'gpt2'", "supported are"])],
)
def test_a_source_that_does_not_classify_is_refused_at_once(
    tmp_path, monkeypatch, capsys, model_type, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert main(["quickstart", "--source", "source"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_data_of_one_class_is_one_line(tmp_path, capsys):
    (tmp_path / "data.csv").write_text("text,label\na,1\nb,1\n")
    arguments = ["--data", str(tmp_path / "data.csv"), "--output", str(tmp_path / "output")]
    assert main(["quickstart", *arguments]) == 2
    error = capsys.readouterr().err
    assert "at least two different labels are needed" in error and error.count("\n") == 1
    assert not (tmp_path / "output").exists()


def test_bag_of_words_tells_different_words_apart(data):
    documents = quickstart.LabelledDocuments(
        ["a", "b"],
        *([quickstart.Document([5], f"{'xx' if i % 2 else 'yy'} {i}", i % 2) for i in range(8)],)
        * 2,
    )
    assert quickstart.bag_of_words_accuracy(documents) == 1.0


@pytest.mark.slow
def test_documents_of_this_python(tmp_path, capsys):
    arguments = ["--output", str(tmp_path / "output"), "--max-length", "1024", "--epochs", "1"]
    assert main(["quickstart", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "standard library" in printed
    assert "saved and reloaded, difference" in printed
