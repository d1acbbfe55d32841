import io
import json
import shutil
import sys

import pytest
from transformers import AutoTokenizer

from adaptive_longformer import (
    AdaptiveSparseConfig,
    AdaptiveSparseForMaskedLM,
    AdaptiveSparseForQuestionAnswering,
)
from adaptive_longformer.testing import randomize_all_parameters
from adaptive_longformer.training.small_longformer import train_byte_level_tokenizer
from adaptive_longformer_command_line import main

DOCUMENT = "The cat sat on the mat.\nThe dog ran after the bird. " * 10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_byte_level_tokenizer([DOCUMENT], vocab_size=300, max_length=64)
    config = AdaptiveSparseConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, attention_window=32, max_position_embeddings=66,
    )  # fmt: skip
    model = randomize_all_parameters(AdaptiveSparseForQuestionAnswering(config))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_answers_are_printed_with_their_place(checkpoint, tmp_path, capsys):
    file = tmp_path / "document.txt"
    file.write_text(DOCUMENT)
    assert main(["answer", checkpoint, "Who sat?", str(file), "--answers", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        _, place, text = line.split("\t")
        start, end = map(int, place.split("-"))
        assert " ".join(DOCUMENT[start:end].split()) == text and text


def test_the_document_may_come_from_standard_input(checkpoint, monkeypatch, capsys):
    stdin = io.TextIOWrapper(io.BytesIO(DOCUMENT.encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["answer", checkpoint, "Who sat?"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("content, words", [(b"", "is empty"), (b"\xff\xfe\x00", "UTF-8")])
def test_an_unreadable_file_is_one_line(checkpoint, tmp_path, capsys, content, words):
    file = tmp_path / "document.txt"
    file.write_bytes(content)
    assert main(["answer", checkpoint, "Who?", str(file)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_config_with_a_wrong_type_is_one_line(checkpoint, tmp_path, capsys):
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": "many"}))
    (tmp_path / "document.txt").write_text(DOCUMENT)
    assert main(["answer", str(folder), "Who?", str(tmp_path / "document.txt")]) == 2
    error = capsys.readouterr().err
    assert "hidden_size" in error and error.count("\n") == 1


def test_a_model_without_weights_for_answers_is_refused(checkpoint, tmp_path, capsys):
    config = AdaptiveSparseConfig.from_pretrained(checkpoint)
    AdaptiveSparseForMaskedLM(config).save_pretrained(tmp_path / "headless")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "headless")
    (tmp_path / "document.txt").write_text(DOCUMENT)
    arguments = [str(tmp_path / "headless"), "Who?", str(tmp_path / "document.txt")]
    assert main(["answer", *arguments]) == 2
    output, error = capsys.readouterr()
    assert output == "" and error.count("\n") == 1
    assert "saved as AdaptiveSparseForMaskedLM, has no weights for qa_outputs.bias, qa" in error
    assert "fine-tune the model" in error


def test_an_adapter_answers_on_its_base(checkpoint, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    base = AdaptiveSparseForQuestionAnswering.from_pretrained(checkpoint)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="QUESTION_ANS"))
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "adapter")
    (tmp_path / "document.txt").write_text(DOCUMENT)
    answers = []
    for folder in (checkpoint, str(tmp_path / "adapter")):
        assert main(["answer", folder, "Who sat?", str(tmp_path / "document.txt")]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]  # a fresh adapter changes nothing


@pytest.mark.parametrize("damage", ["half", "size", "tokenizer"])
def test_a_damaged_checkpoint_is_one_line(checkpoint, tmp_path, capsys, damage):
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    if damage == "half":
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    elif damage == "size":
        (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    else:
        for file in folder.glob("tokenizer*"):
            file.unlink()
        # As after a conversion; Transformers then makes a tokenizer without words.
        (folder / "config.json").write_text(
            json.dumps({**config, "tokenizer_class": "RobertaTokenizer"})
        )
    (tmp_path / "document.txt").write_text(DOCUMENT)
    assert main(["answer", str(folder), "Who?", str(tmp_path / "document.txt")]) == 2
    output, error = capsys.readouterr()
    assert output == "" and error.count("\n") == 1
    words = "holds no tokenizer" if damage == "tokenizer" else "the weights are damaged, or not"
    assert words in error and str(folder) in error
