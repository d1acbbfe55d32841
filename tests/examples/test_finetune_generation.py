"""The examples for summarisation and question answering, on a small LED made on the spot."""

import contextlib
import io
import json
import runpy
from pathlib import Path

import pytest
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LEDConfig,
    LEDForConditionalGeneration,
    set_seed,
)

from adaptive_longformer.inference import summarize
from adaptive_longformer.training.document_pairs import load_document_pairs
from adaptive_longformer.training.small_longformer import train_byte_level_tokenizer
from adaptive_longformer.training.text_metrics import AnswerMetric, RougeMetric
from adaptive_longformer_command_line import main

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An LED that reads 256 tokens, and ten documents with queries."""
    folder = tmp_path_factory.mktemp("files")
    rows = [
        {
            "document": f"Meeting {i}. " + "They spoke about the budget. " * (5 + i),
            "queries": [
                {"query": "What was it about?", "answer": "the budget"},
                {"query": "Summarize the meeting", "answer": f"Meeting {i} was on the budget."},
            ],
        }
        for i in range(10)
    ]
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:8]))
    (folder / "validation.jsonl").write_text("\n".join(json.dumps(row) for row in rows[8:]))
    texts = [row["document"] for row in rows]
    tokenizer = train_byte_level_tokenizer(texts, vocab_size=320, max_length=256)
    set_seed(0)
    config = LEDConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_encoder_position_embeddings=128,
        max_decoder_position_embeddings=32, attention_window=32,
    )  # fmt: skip
    LEDForConditionalGeneration(config).save_pretrained(folder / "led")
    tokenizer.save_pretrained(folder / "led")
    return folder


def arguments(files, output, *more):
    return [
        "--model", str(files / "led"), "--data-file", str(files / "train.jsonl"),
        "--eval-file", str(files / "validation.jsonl"), "--output", str(output),
        "--max-length", "256", "--max-target-length", "12", "--batch-size", "4",
        "--gradient-accumulation", "1", "--learning-rate", "3e-3", "--cpu", *more,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, metrics",
    [
        ("finetune_summarization.py", {"rouge1", "rouge2", "rougeL", "rougeLsum"}),
        ("finetune_question_answering.py", {"exact_match", "f1"}),
    ],
)
def test_an_led_is_converted_fine_tuned_and_resumed(script, metrics, files, tmp_path, capsys):
    example = runpy.run_path(str(EXAMPLES / script))
    first = example["main"](arguments(files, tmp_path, "--epochs", "1"))
    assert {"eval_loss", *(f"eval_{name}" for name in metrics)} <= set(first)
    assert "% of the documents' tokens are read" in capsys.readouterr().out
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "adaptive_sparse_seq2seq"
    assert config["max_encoder_position_embeddings"] == 256
    second = example["main"](arguments(files, tmp_path, "--epochs", "3", "--resume"))
    state = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["epoch"] == 3 and state["log_history"][0]["epoch"] <= 1
    assert second["eval_loss"] < first["eval_loss"]


def summaries(folder, pairs):
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [summarize(model, tokenizer, pair["document"]).text for pair in pairs]


def answers(folder, pairs):
    found = []
    for pair in pairs:
        (folder / "document.txt").write_text(pair["document"])
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert main(["answer", str(folder), pair["query"], str(folder / "document.txt")]) == 0
        found.append(out.getvalue().removesuffix("\n").split("\t")[2])
    return found


@pytest.mark.parametrize(
    "script, metric, use",
    [
        ("finetune_summarization.py", RougeMetric, summaries),
        ("finetune_question_answering.py", AnswerMetric, answers),
    ],
)
def test_what_is_trained_scores_the_same_where_it_is_used(script, metric, use, files, tmp_path):
    example = runpy.run_path(str(EXAMPLES / script))
    settings = arguments(files, tmp_path, "--epochs", "8", "--num-beams", "2")
    settings += ["--learning-rate", "2e-2"]
    if use is summaries:
        for name in ("train", "validation"):
            pairs = load_document_pairs(files / f"{name}.jsonl")
            rows = [{"document": p["document"], "summary": p["targets"]} for p in pairs[1::2]]
            text = "\n".join(json.dumps(row) for row in rows)
            settings[settings.index(str(files / f"{name}.jsonl"))] = str(tmp_path / f"{name}.jsonl")
            (tmp_path / f"{name}.jsonl").write_text(text)
    settings += ["--test-file", settings[settings.index("--eval-file") + 1]]
    result = example["main"](settings)
    pairs = load_document_pairs(settings[-1])
    found = metric().compute(
        predictions=use(tmp_path, pairs), references=[pair["targets"] for pair in pairs]
    )
    assert found == pytest.approx({name: result[f"eval_{name}"] for name in found})
    assert found == pytest.approx({name: result[f"test_{name}"] for name in found})
    assert max(found.values()) > 0  # something was learned that can differ
    written = [json.loads(line) for line in (tmp_path / "predictions.jsonl").open()]
    assert [(row["query"], row["targets"]) for row in written] == [
        (pair["query"], pair["targets"]) for pair in pairs
    ]
    again = metric().compute(
        predictions=[row["text"] for row in written],
        references=[row["targets"] for row in written],
    )
    assert again == pytest.approx(found)


def narrative_rows():
    for name in "abc":
        for question in range(2):
            yield {
                "document": {"id": name, "text": f"book {name}"},
                "question": {"text": f"{name}{question}?"},
                "answers": [{"text": "yes"}, {"text": "indeed"}],
            }


def test_questions_of_a_book_share_its_text_and_reading_stops():
    example = runpy.run_path(str(EXAMPLES / "finetune_question_answering.py"))
    rows = narrative_rows()
    pairs = example["narrative_pairs"](rows, max_documents=2)
    assert [pair["query"] for pair in pairs] == ["a0?", "a1?", "b0?", "b1?"]
    assert pairs[0]["document"] is pairs[1]["document"]
    assert pairs[0]["targets"] == ["yes", "indeed"]
    assert next(rows)["question"]["text"] == "c1?"  # the first row of c was looked at
