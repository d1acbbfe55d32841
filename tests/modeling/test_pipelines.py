"""Transformers' pipelines take our models as they are."""

import pytest
from transformers import PreTrainedTokenizerFast, pipeline

import adaptive_longformer
from adaptive_longformer.testing import tiny_model

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers builds the tiny tokenizer")


def tiny_tokenizer():
    """One token per word of "a b c ... z"."""
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"abcdefghijklmnopqrstuvwxyz"]
    words = {name: index for index, name in enumerate(names)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        sep_token="</s>",
        eos_token="</s>",
        mask_token="<mask>",
    )


def make_pipeline(task, head, **overrides):
    tokenizer = tiny_tokenizer()
    model_class = getattr(adaptive_longformer, "AdaptiveSparse" + head)
    model = tiny_model(model_class, vocab_size=len(tokenizer), **overrides)
    return pipeline(task, model=model, tokenizer=tokenizer, device="cpu")


LONG = "a b c d e f g h " * 20
by_pattern = pytest.mark.parametrize("attention_pattern", ["longformer", "big_bird"])
BLOCKS = dict(block_size=8, num_random_blocks=1)


@by_pattern
def test_text_classification(attention_pattern):
    classify = make_pipeline(
        "text-classification", "ForSequenceClassification", attention_pattern=attention_pattern,
        **BLOCKS,
    )  # fmt: skip
    results = classify(["a b c", LONG], batch_size=2)
    assert [result["label"] in ("LABEL_0", "LABEL_1") for result in results] == [True, True]
    alone = classify(LONG)[0]
    assert alone["score"] == pytest.approx(results[1]["score"], abs=1e-5)


@by_pattern
def test_token_classification(attention_pattern):
    classify = make_pipeline(
        "token-classification", "ForTokenClassification", attention_pattern=attention_pattern,
        num_labels=3, **BLOCKS,
    )  # fmt: skip
    results = classify(LONG)
    assert [result["word"] for result in results] == LONG.split()
    assert {result["entity"] for result in results} <= {"LABEL_0", "LABEL_1", "LABEL_2"}


@by_pattern
def test_fill_mask(attention_pattern):
    fill = make_pipeline("fill-mask", "ForMaskedLM", attention_pattern=attention_pattern, **BLOCKS)
    results = fill(LONG + "<mask>", top_k=3)
    scores = [result["score"] for result in results]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("options", [{}, dict(num_beams=3)], ids=["greedy", "beams"])
def test_text_generation(options):
    generate = make_pipeline(
        "text-generation", "ForCausalLM", attention_window=16, num_sink_tokens=2
    )
    options = dict(max_new_tokens=12, do_sample=False, return_full_text=False, **options)
    texts = ["a b c", LONG]
    together = generate(texts, batch_size=2, **options)
    for text, results in zip(texts, together, strict=True):
        assert results == generate(text, **options)
        assert len(results[0]["generated_text"].split()) > 0
