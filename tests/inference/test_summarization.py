import io
import sys

import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from adaptive_longformer import (
    AdaptiveSparseForQuestionAnswering,
    AdaptiveSparseSeq2SeqForSequenceClassification,
)
from adaptive_longformer.inference.summarization import summarize
from adaptive_longformer.modeling.modeling_adaptive_sparse import AdaptiveSparseModel
from adaptive_longformer.modeling.modeling_adaptive_sparse_seq2seq import (
    AdaptiveSparseForConditionalGeneration,
)
from adaptive_longformer.testing import tiny_model, tiny_seq2seq_model
from adaptive_longformer_command_line import main

DOCUMENT = " ".join(f"w{index % 50}" for index in range(300))


@pytest.fixture
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{index}" for index in range(93))]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def model_for_summaries(**overrides):
    return tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration, **overrides)


def test_summary_is_what_generate_writes_with_a_global_first_token(tokenizer):
    options = dict(separate_global_projections=True, default_global_tokens="none")
    model = model_for_summaries(**options)
    summary = summarize(model, tokenizer, DOCUMENT, max_new_tokens=20)
    inputs = tokenizer(DOCUMENT, return_tensors="pt")
    mask = torch.zeros_like(inputs["input_ids"])
    mask[:, 0] = 1
    written = model.generate(
        input_ids=inputs["input_ids"],
        global_attention_mask=mask,
        max_new_tokens=20,
        num_beams=4,
        no_repeat_ngram_size=3,
        length_penalty=2.0,
    )
    assert summary.text == tokenizer.decode(written[0], skip_special_tokens=True)
    assert summary.text
    assert (summary.num_tokens_read, summary.num_tokens) == (302, 302)
    assert summary.is_of_the_whole_document


def test_settings_of_the_checkpoint_come_before_the_defaults_and_the_callers_before_both(tokenizer):
    model = model_for_summaries()
    tokens = dict(pad_token_id=1, eos_token_id=2, decoder_start_token_id=2)
    model.generation_config = GenerationConfig(num_beams=2, max_length=9, **tokens)
    calls = []
    generate = model.generate
    model.generate = lambda **options: calls.append(options) or generate(**options)
    summarize(model, tokenizer, DOCUMENT)
    assert calls[-1]["max_new_tokens"] == 8 and "num_beams" not in calls[-1]
    assert calls[-1]["length_penalty"] == 2.0
    summarize(model, tokenizer, DOCUMENT, num_beams=1, max_new_tokens=3, do_sample=True)
    assert calls[-1]["num_beams"] == 1 and calls[-1]["max_new_tokens"] == 3
    assert "length_penalty" not in calls[-1]
    model.generation_config = GenerationConfig(**tokens)
    summarize(model, tokenizer, DOCUMENT)
    assert calls[-1]["max_new_tokens"] == 128  # what the decoder can write


def test_a_longer_document_is_cut_and_said_so(tokenizer):
    model = model_for_summaries(max_encoder_position_embeddings=64)
    summary = summarize(model, tokenizer, DOCUMENT, max_new_tokens=3)
    assert (summary.num_tokens_read, summary.num_tokens) == (64, 302)
    assert not summary.is_of_the_whole_document
    beginning = " ".join(DOCUMENT.split()[:62])
    assert summarize(model, tokenizer, beginning, max_new_tokens=3).text == summary.text


def test_a_document_of_10_megabytes_is_read_as_far_as_the_model_can(tokenizer):
    model = model_for_summaries(max_encoder_position_embeddings=64)
    text = DOCUMENT * (10_000_000 // len(DOCUMENT))
    summary = summarize(model, tokenizer, text, max_new_tokens=3)
    assert summary.num_tokens_read == 64 and summary.num_tokens > 2_000_000


def test_progress_is_reported_and_the_mode_of_the_model_kept(tokenizer):
    model = model_for_summaries().train()
    steps = []
    summarize(
        model,
        tokenizer,
        DOCUMENT,
        max_new_tokens=5,
        min_new_tokens=5,
        progress=lambda *step: steps.append(step),
    )
    assert model.training
    assert steps[:2] == [("reading", 0, 302), ("reading", 302, 302)]
    assert steps[2:] == [("writing", n, 5) for n in (1, 2, 3, 4, 5, 5)]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "text is empty"),
        (" \n\t ", {}, "text is empty"),
        ("unknown words", {}, "no token the tokenizer knows"),
        (["w1"], {}, "text is a list"),
        ("w1", {"max_new_tokens": 0}, "max_new_tokens is 0, 1 to 128"),
        ("w1", {"max_new_tokens": 129}, "max_new_tokens is 129, 1 to 128"),
    ],
)
def test_bad_input_is_named(tokenizer, text, options, message):
    with pytest.raises(ValueError, match=message):
        summarize(model_for_summaries(), tokenizer, text, **options)


def test_a_model_of_another_kind_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"AdaptiveSparseModel.*ForConditionalGeneration"):
        summarize(tiny_model(AdaptiveSparseModel), tokenizer, "w1")


@pytest.fixture
def folder(tmp_path, tokenizer):
    model_for_summaries(max_encoder_position_embeddings=64).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_command_summarises_a_file_and_says_what_was_read(tmp_path, folder, tokenizer, capsys):
    (tmp_path / "document.txt").write_text(DOCUMENT)
    options = ["--max-new-tokens", "6", "--num-beams", "2"]
    assert main(["summarize", str(folder), str(tmp_path / "document.txt"), *options]) == 0
    output, errors = capsys.readouterr()
    model = AdaptiveSparseForConditionalGeneration.from_pretrained(folder)
    expected = summarize(model, tokenizer, DOCUMENT, max_new_tokens=6, num_beams=2)
    assert output == expected.text + "\n"
    assert "the first 64 of the document's 302 tokens" in errors
    assert "writing: 100 %" in errors


def test_command_reads_stdin(folder, capsys, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"w1 w2 w3"), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["summarize", str(folder), "--max-new-tokens", "2"]) == 0
    output, errors = capsys.readouterr()
    assert output.count("\n") == 1 and "tokens" not in errors


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        (b"", [], "document.txt is empty"),
        (b"\xff\xfe\x00", [], "document.txt is not text in UTF-8"),
        (None, [], "document.txt"),
        (b"w1", ["--num-beams", "0"], "--num-beams: 0"),
        (b"w1", ["--max-new-tokens", "1000"], "max_new_tokens is 1000"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, folder, capsys, content, arguments, words):
    file = tmp_path / "document.txt"
    if content is not None:
        file.write_bytes(content)
    assert main(["summarize", str(folder), str(file), *arguments]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert words in errors[-1] and len(errors) == 1


def test_a_missing_model_is_one_line(tmp_path, capsys):
    (tmp_path / "document.txt").write_text("w1")
    assert main(["summarize", str(tmp_path / "nowhere"), str(tmp_path / "document.txt")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and "nowhere" in errors[0]


@pytest.mark.parametrize(
    "make, head",
    [
        (tiny_model, AdaptiveSparseForQuestionAnswering),
        (tiny_seq2seq_model, AdaptiveSparseSeq2SeqForSequenceClassification),
    ],
)
def test_a_checkpoint_of_another_head_is_named(tokenizer, tmp_path, capsys, make, head):
    """Also one whose weights would be enough to write nonsense."""
    make(head).save_pretrained(tmp_path / "model")
    (tmp_path / "document.txt").write_text(DOCUMENT)
    assert main(["summarize", str(tmp_path / "model"), str(tmp_path / "document.txt")]) == 2
    output, error = capsys.readouterr()
    assert output == "" and f"saved as {head.__name__}, writes no text" in error
    assert error.count("\n") == 1
