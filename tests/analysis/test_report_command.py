import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

import adaptive_longformer.analysis.command as report_command
from adaptive_longformer.analysis.reading_map import (
    reading_maps,
    save_reading_maps,
)
from adaptive_longformer.analysis.sparsity import sparsity_report
from adaptive_longformer.conversion.convert import convert_checkpoint
from adaptive_longformer.modeling.modeling_adaptive_sparse import (
    AdaptiveSparseForMaskedLM,
    AdaptiveSparseModel,
)
from adaptive_longformer.modeling.modeling_adaptive_sparse_causal import (
    AdaptiveSparseForCausalLM,
)
from adaptive_longformer.testing import (
    tiny_adaptive_model,
    tiny_inputs,
    tiny_model,
    tiny_seq2seq_model,
)
from adaptive_longformer.training.small_longformer import train_byte_level_tokenizer
from adaptive_longformer_command_line import main


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """An adaptive and a plain checkpoint with a tokenizer, and a document."""
    folder = tmp_path_factory.mktemp("report")
    text = " ".join(f"word{number % 40} and" for number in range(400))
    (folder / "document.txt").write_text(text)
    tokenizer = train_byte_level_tokenizer([text], vocab_size=300)
    for name, model in (
        ("adaptive", tiny_adaptive_model(AdaptiveSparseForMaskedLM, vocab_size=300)),
        ("plain", tiny_model(AdaptiveSparseForMaskedLM, vocab_size=300)),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def test_report_prints_a_line_per_layer_and_writes_numbers_and_figure(places, capsys):
    pytest.importorskip("matplotlib")
    arguments = [str(places / "adaptive"), str(places / "document.txt")]
    files = ["--json", str(places / "report.json"), "--figure", str(places / "map.png")]
    assert main(["report", *arguments, *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "strength 1" in lines[0]
    table, legend = lines[1:4], lines[5:]
    assert [line.split()[0] for line in table] == ["layer", "0", "1"]
    for column in ("keys/query", "blocks", "missed mass", "recall", "budgets", "windows"):
        assert column in table[0]
        assert sum(line.startswith(f"{column} ") for line in legend) == 1
    numbers = json.loads((places / "report.json").read_text())
    assert numbers["layers"][0]["selected_keys"] > 0
    assert (places / "map.png").read_bytes().startswith(b"\x89PNG")


def test_report_shows_what_a_plain_checkpoint_would_select(places, capsys):
    arguments = ["report", str(places / "plain"), str(places / "document.txt")]
    assert main(arguments) == 2
    assert "--strength 1" in capsys.readouterr().err
    assert main([*arguments, "--strength", "0.5"]) == 0
    assert "strength 0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "is empty"), (b"\xff\xfe\x00", "not text in UTF-8")]
)
def test_documents_that_are_none_are_refused_in_one_line(places, capsys, content, words):
    (places / "bad.txt").write_bytes(content)
    assert main(["report", str(places / "adaptive"), str(places / "bad.txt")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_maps_show_the_window_and_what_was_selected():
    model = tiny_adaptive_model()
    for reading_map in reading_maps(model, tiny_inputs(model, 300, padding="left")):
        shares = reading_map.shares
        assert shares.shape == (19, 19)
        assert (shares.diagonal() == 1).all()
        assert 0 < shares[0, 5:].sum() <= 4
        assert shares.max() == 1
    model.set_selection_strength(0.0)
    for reading_map in reading_maps(model, tiny_inputs(model, 300, padding="none")):
        assert torch.equal(reading_map.shares.nonzero().diff(dim=1).abs().max(), torch.tensor(1))


def test_maps_show_the_blocks_with_global_tokens():
    model = tiny_adaptive_model()
    inputs = tiny_inputs(model, 300, padding="none")
    is_global = torch.zeros_like(inputs["input_ids"])
    is_global[0, [0, 3, 100]] = 1
    is_global[1, 200] = 1  # another document
    for reading_map in reading_maps(model, {**inputs, "global_attention_mask": is_global}):
        size = reading_map.key_block_size
        assert reading_map.has_global.nonzero().flatten().tolist() == [0, 100 // size]


def test_multiples_of_the_length_of_the_source_are_marked(places, tmp_path, capsys, monkeypatch):
    """A BERT of 64 positions made long, whose projections hear nothing but positions."""
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
        intermediate_size=32, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    source = BertModel(config).eval()
    with torch.no_grad():
        source.embeddings.word_embeddings.weight.mul_(0.01)
        for name in ("query", "key"):
            layer = getattr(source.encoder.layer[0].attention.self, name)
            layer.weight.copy_(torch.eye(32) * 3)
    source.save_pretrained(tmp_path / "bert")
    convert_checkpoint(tmp_path / "bert", tmp_path / "long", max_positions=512, attention_window=32)
    model = AdaptiveSparseModel.from_pretrained(
        tmp_path / "long", attention_pattern="adaptive", num_selected_blocks=4,
        selection_strength=1.0,
    )  # fmt: skip
    assert model.config.repeated_length == 64
    (reads,) = reading_maps(model, {"input_ids": torch.randint(5, 300, (1, 512))})
    # 4 of at most 14 blocks apart from the window: those around -64, 64, 128, ... tokens.
    assert reads.share_at_multiples(64) > 0.9
    scattered = replace(reads, selected=torch.ones_like(reads.selected))
    assert scattered.share_at_multiples(64) == (32 * 8 - 32) / 32**2  # not those on the diagonal

    model.save_pretrained(tmp_path / "adaptive")
    tokenizer = AutoTokenizer.from_pretrained(places / "adaptive")
    tokenizer.save_pretrained(tmp_path / "adaptive")
    drawn = []
    monkeypatch.setattr(report_command, "save_reading_maps", lambda *args: drawn.append(args))
    arguments = [str(tmp_path / "adaptive"), str(places / "document.txt")]
    files = ["--json", str(tmp_path / "report.json"), "--figure", str(tmp_path / "map.png")]
    assert main(["report", *arguments, *files]) == 0
    assert "positions repeat after 64 tokens" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["repeated_length"] == 64 and numbers["selected_at_multiples"][0] > 0.9
    pytest.importorskip("matplotlib")
    (maps, file, *more) = drawn[0]
    assert more[-1] == 64
    save_reading_maps(maps, file, *more)
    save_reading_maps(maps, tmp_path / "plain.png", more[0])
    assert (tmp_path / "map.png").read_bytes() != (tmp_path / "plain.png").read_bytes()
    assert tiny_model().config.repeated_length is None


def test_a_causal_checkpoint_is_reported_as_it_reads(places, tmp_path, capsys):
    model = tiny_adaptive_model(AdaptiveSparseForCausalLM, vocab_size=300)
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(places / "adaptive")
    tokenizer.save_pretrained(tmp_path)
    text = (places / "document.txt").read_text()
    batch = tokenizer(text, return_tensors="pt", truncation=True, max_length=1024)
    expected = sparsity_report(model, {"input_ids": batch["input_ids"]})
    assert main(["report", str(tmp_path), str(places / "document.txt")]) == 0
    assert f"{expected.keys_per_query:.1f} keys per query" in capsys.readouterr().out


def test_an_encoder_decoder_is_refused(places, tmp_path, capsys):
    tiny_seq2seq_model(vocab_size=300).save_pretrained(tmp_path)
    assert main(["report", str(tmp_path), str(places / "document.txt"), "--strength", "1"]) == 2
    error = capsys.readouterr().err
    assert "is an encoder-decoder" in error and error.count("\n") == 1
