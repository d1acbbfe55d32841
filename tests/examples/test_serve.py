"""The server answers what the model says, whoever asks at the same time."""

import asyncio
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import pipeline

from adaptive_longformer import AdaptiveSparseConfig, AdaptiveSparseForSequenceClassification
from adaptive_longformer.testing import randomize_all_parameters
from adaptive_longformer.training.small_longformer import train_byte_level_tokenizer

pytest.importorskip("fastapi", reason="fastapi is not installed: the extra dev has it")
from fastapi.testclient import TestClient

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "serve.py"
WORDS = ["the", "council", "met", "and", "spoke", "about", "budget", "of", "harbour"]
MAX_LENGTH = 1000


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    tokenizer = train_byte_level_tokenizer([" ".join(WORDS)], vocab_size=300, max_length=MAX_LENGTH)
    config = AdaptiveSparseConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=MAX_LENGTH + 2, attention_window=64,
        attention_pattern="longformer", num_labels=3,
        id2label={0: "harbour", 1: "budget", 2: "other"}, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = AdaptiveSparseForSequenceClassification(config)
    randomize_all_parameters(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def documents():
    """Of 1 to about 1,300 tokens, the longest cut."""
    return [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(1 + 90 * i)) for i in range(12)]


def test_answers_are_those_of_the_pipeline_when_many_ask_at_once(example, folder):
    classify = pipeline("text-classification", model=str(folder), device="cpu")
    expected = [classify(text, truncation=True)[0] for text in documents()]
    assert len({answer["score"] for answer in expected}) > 6
    with TestClient(example["create_app"](str(folder), max_tokens=2048)) as client:
        ask = lambda text: client.post("/classify", json={"text": text})  # noqa: E731
        with ThreadPoolExecutor(12) as threads:
            answers = [answer.json() for answer in threads.map(ask, documents())]
        assert ask("").status_code == 200
        assert client.post("/classify", json={"words": "x"}).status_code == 422
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer["label"] == wanted["label"]
        assert answer["score"] == pytest.approx(wanted["score"], abs=1e-5)
    assert answers[-1]["tokens"] == MAX_LENGTH


def test_batches_hold_documents_of_about_one_length_and_so_many_tokens(example):
    lengths = [900, 3, 500, 4, 1200, 450, 5]
    found = example["batches"]([([0] * length, None) for length in lengths], 1000)
    assert [[len(ids) for ids, _ in batch] for batch in found] == [
        [3, 4, 5], [450, 500], [900], [1200],
    ]  # fmt: skip


def test_an_error_reaches_those_who_asked_and_the_next_ones_are_answered(example):
    def classify(documents):
        if 13 in documents[0]:
            raise ValueError("13 is not allowed")
        return [sum(ids) for ids in documents]

    async def ask():
        queue = asyncio.Queue()
        worker = asyncio.create_task(example["answer_requests"](queue, classify, 4))
        futures = [asyncio.get_running_loop().create_future() for _ in range(4)]
        futures[2].cancel()
        for ids, future in zip(([1, 2], [13, 1, 1], [5], [4, 4, 4, 4]), futures, strict=True):
            await queue.put((ids, future))
        results = await asyncio.gather(*futures, return_exceptions=True)
        worker.cancel()
        return results

    first, second, third, last = asyncio.run(ask())
    assert (first, last) == (3, 16)
    assert isinstance(second, ValueError) and isinstance(third, asyncio.CancelledError)
