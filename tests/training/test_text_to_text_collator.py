import pytest

from adaptive_longformer.training.small_longformer import train_byte_level_tokenizer
from adaptive_longformer.training.text_to_text_collator import TextToTextCollator

DOCUMENT = "the cat sat on the mat and the dog ran after the bird " * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_level_tokenizer([DOCUMENT], vocab_size=300, max_length=64)


def pair(document=DOCUMENT, query="", targets=("a cat",)):
    return {"document": document, "query": query, "targets": list(targets)}


def test_long_documents_are_cut_and_short_ones_padded(tokenizer):
    collator = TextToTextCollator(tokenizer, max_length=32, max_target_length=8)
    batch = collator([pair(), pair("the cat", targets=["the dog ran after the bird", "unused"])])
    assert batch["input_ids"].shape == (2, 32)
    assert batch["attention_mask"][0].all() and not batch["attention_mask"][1].all()
    assert batch["input_ids"][0, [0, -1]].tolist() == [0, 2]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    for row, text in enumerate(["a cat", "the dog ran after the bird"]):
        expected = tokenizer(text)["input_ids"][:8]
        labels = batch["labels"][row]
        assert labels[: len(expected) - 1].tolist() == expected[:-1]
        assert (labels[len(expected) :] == -100).all()
    assert batch["labels"].shape[1] <= 8


def test_the_query_is_never_cut(tokenizer):
    collator = TextToTextCollator(tokenizer, max_length=32, max_target_length=8)
    batch = collator([pair(query="where is the cat")])
    question = tokenizer("where is the cat")["input_ids"]
    size = len(question) - 1  # without its separator
    assert batch["input_ids"][0, : size + 1].tolist() == question


def test_coverage_counts_every_document_once(tokenizer):
    collator = TextToTextCollator(tokenizer, max_length=32, max_target_length=8)
    long, short = (len(tokenizer(text)["input_ids"]) for text in (DOCUMENT, "the cat"))
    pairs = [pair(query="a"), pair(query="b"), pair("the cat")]
    assert collator.coverage(pairs) == pytest.approx((32 + short) / (long + short))
