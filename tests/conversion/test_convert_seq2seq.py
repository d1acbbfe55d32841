import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from checkpoints import in_tolerances
from safetensors.torch import load_file, save_file
from seq2seq_checkpoints import FAMILIES, HEADS, load_converted, source_model, write_source
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from adaptive_longformer.conversion import to_adaptive_sparse
from adaptive_longformer.conversion.checkpoint import Checkpoint
from adaptive_longformer.conversion.convert import convert_checkpoint
from adaptive_longformer.modeling.modeling_adaptive_sparse_seq2seq import (
    AdaptiveSparseForConditionalGeneration,
    AdaptiveSparseSeq2SeqForSequenceClassification,
)
from adaptive_longformer.testing import tiny_seq2seq_model

family_and_head = pytest.mark.parametrize(
    ("family", "head"), [(family, head) for family in FAMILIES for head in HEADS[family]]
)
by_family = pytest.mark.parametrize("family", FAMILIES)


def tensors_of(folder):
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.load(name) for name in checkpoint.tensors}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def assert_identical(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@family_and_head
def test_verify_finds_equal_logits_in_both_directions(tmp_path, family, head):
    source = write_source(tmp_path / "source", family, head)
    report = convert_checkpoint(source, tmp_path / "target", verify=True)
    assert report.max_logit_difference is not None and report.max_logit_difference < 1e-4
    assert report.source_model_type == family
    model = load_converted(tmp_path / "target", head)
    assert report.architecture == type(model).__name__
    tensors = [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.ndim)]
    assert report.num_parameters == sum(tensor.numel() for tensor in tensors)
    back = convert_checkpoint(tmp_path / "target", tmp_path / "back", reverse=True, verify=True)
    # The same inputs again; where matrices lie in memory may change how a CPU rounds.
    assert back.max_logit_difference == pytest.approx(report.max_logit_difference, abs=1e-5)
    assert back.architecture == FAMILIES[family] + head


@family_and_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_config_come_back_bit_for_bit(tmp_path, family, head, dtype):
    source_model(family, head).to(dtype).save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "target")
    convert_checkpoint(tmp_path / "target", tmp_path / "back", reverse=True)
    assert_identical(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "source"))
    assert config_of(tmp_path / "back") == config_of(tmp_path / "source")


@by_family
def test_a_table_stored_under_all_its_names_comes_back(tmp_path, family):
    source = write_source(tmp_path / "source", family, "ForConditionalGeneration")
    tensors = load_file(source / "model.safetensors")
    prefix = "led." if family == "led" else "model."
    words = tensors[prefix + "shared.weight"]
    for name in (
        prefix + "encoder.embed_tokens.weight",
        prefix + "decoder.embed_tokens.weight",
        "lm_head.weight",
    ):
        tensors[name] = words.clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(source, tmp_path / "target", verify=True)
    names = [name for name in tensors_of(tmp_path / "target") if "word_embeddings" in name]
    assert names == ["model.encoder.embeddings.word_embeddings.weight"]
    convert_checkpoint(tmp_path / "target", tmp_path / "back", reverse=True, verify=True)
    assert_identical(tensors_of(tmp_path / "back"), tensors)
    # One name of the table is enough, whichever it is.
    for name in list(tensors):
        if torch.equal(tensors[name], words) and not name.startswith(prefix + "decoder"):
            del tensors[name]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(source, tmp_path / "target", overwrite=True)
    loaded = load_converted(tmp_path / "target", "ForConditionalGeneration")
    assert torch.equal(loaded.lm_head.weight, words)


@by_family
@pytest.mark.parametrize("changed", ["decoder.embed_tokens.weight", "lm_head.weight"])
def test_tied_tables_that_differ_are_kept_apart(tmp_path, family, changed):
    source = write_source(tmp_path / "source", family, "ForConditionalGeneration")
    tensors = load_file(source / "model.safetensors")
    prefix = "led." if family == "led" else "model."
    name = changed if changed == "lm_head.weight" else prefix + changed
    tensors[name] = torch.randn_like(tensors[prefix + "shared.weight"])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = convert_checkpoint(source, tmp_path / "target", verify=True)
    assert any(f"{name} differs from the word embeddings" in note for note in report.notes)
    with pytest.raises(ValueError, match=r"shared.weight and .*encoder.embed_tokens.weight differ"):
        tensors[prefix + "encoder.embed_tokens.weight"] = torch.randn(100, 32)
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        convert_checkpoint(source, tmp_path / "other")


@by_family
def test_untied_tables_convert(tmp_path, family):
    source = write_source(
        tmp_path / "source", family, "ForConditionalGeneration", tie_word_embeddings=False
    )
    convert_checkpoint(source, tmp_path / "target", verify=True)
    assert not load_converted(
        tmp_path / "target", "ForConditionalGeneration"
    ).config.tie_word_embeddings
    convert_checkpoint(tmp_path / "target", tmp_path / "back", reverse=True, verify=True)
    assert_identical(tensors_of(tmp_path / "back"), tensors_of(source))


def test_more_positions_for_the_document_are_cut_back(tmp_path):
    source = write_source(
        tmp_path / "source",
        "led",
        "ForConditionalGeneration",
        max_encoder_position_embeddings=96,
        attention_window=32,
    )
    report = convert_checkpoint(source, tmp_path / "target", max_positions=1000, verify=True)
    assert any("extended from 96 to 1000 tokens" in note for note in report.notes)
    model = load_converted(tmp_path / "target", "ForConditionalGeneration")
    assert model.config.max_sequence_length == 1000
    table = model.model.encoder.embeddings.position_embeddings.weight
    assert table.shape[0] == 1000
    assert torch.equal(table[96:192], table[:96])
    assert model.model.decoder.embeddings.position_embeddings.weight.shape[0] == 1100
    with torch.no_grad():
        ids = torch.full((1, 1000), 7)
        assert model(input_ids=ids, decoder_input_ids=ids[:, :3]).logits.isfinite().all()
    convert_checkpoint(tmp_path / "target", tmp_path / "back", reverse=True)
    assert_identical(tensors_of(tmp_path / "back"), tensors_of(source))
    assert config_of(tmp_path / "back") == config_of(source)


def test_blocks_of_bigbird_pegasus_are_taken_over_and_can_be_replaced_at_loading(tmp_path):
    fields = dict(max_position_embeddings=300, num_random_blocks=1, block_size=16)
    source = write_source(
        tmp_path / "source", "bigbird_pegasus", "ForConditionalGeneration", **fields
    )
    report = convert_checkpoint(source, tmp_path / "target", max_positions=1000)
    assert any("extended from 300 to 1000 tokens" in note for note in report.notes)
    config = config_of(tmp_path / "target")
    assert (config["attention_pattern"], config["norm_style"]) == ("big_bird", "pre")
    assert (config["block_size"], config["num_random_blocks"]) == (16, 1)
    assert config["max_encoder_position_embeddings"] == 1000
    assert config["max_decoder_position_embeddings"] == 300
    with pytest.raises(ValueError, match="attention_window: 64 is not allowed"):
        convert_checkpoint(source, tmp_path / "other", attention_window=64)
    model = AdaptiveSparseForConditionalGeneration.from_pretrained(
        tmp_path / "target",
        attention_pattern="longformer",
        attention_window=32,
        default_global_tokens="first",
    )
    assert model.generate(torch.full((1, 900), 7), max_new_tokens=3).shape[0] == 1
    convert_checkpoint(tmp_path / "target", tmp_path / "back", reverse=True)
    assert_identical(tensors_of(tmp_path / "back"), tensors_of(source))
    assert config_of(tmp_path / "back") == config_of(source)


def test_windows_of_led_are_taken_over_or_replaced(tmp_path):
    source = write_source(
        tmp_path / "source", "led", "ForConditionalGeneration", attention_window=[32, 64]
    )
    convert_checkpoint(source, tmp_path / "target")
    assert config_of(tmp_path / "target")["attention_window"] == [32, 64]
    report = convert_checkpoint(source, tmp_path / "other", attention_window=128, verify=True)
    assert any("only up to 17 tokens" in note for note in report.notes)
    assert config_of(tmp_path / "other")["attention_window"] == 128


@by_family
def test_layer_drop_is_said_to_have_no_place(tmp_path, family):
    source = write_source(tmp_path / "source", family, "Model", decoder_layerdrop=0.1)
    report = convert_checkpoint(source, tmp_path / "target")
    assert any("decoder_layerdrop = 0.1" in note for note in report.notes)
    convert_checkpoint(tmp_path / "target", tmp_path / "back", reverse=True)
    assert config_of(tmp_path / "back") == config_of(source)


def test_dropouts_labels_and_special_tokens_are_taken_over(tmp_path):
    fields = dict(
        dropout=0.2,
        attention_dropout=0.3,
        activation_dropout=0.4,
        classifier_dropout=0.25,
        decoder_start_token_id=7,
        init_std=0.05,
        activation_function="relu",
    )
    source = write_source(tmp_path / "source", "led", "ForConditionalGeneration", **fields)
    convert_checkpoint(source, tmp_path / "target", verify=True)
    config = load_converted(tmp_path / "target", "ForConditionalGeneration").config
    assert {name: getattr(config, name) for name in fields} == fields
    assert (config.sep_token_id, config.default_global_tokens) == (2, "none")
    assert config.source_config == config_of(source)


@by_family
def test_a_fine_tuned_model_goes_back(tmp_path, family):
    source = write_source(tmp_path / "source", family, "ForConditionalGeneration")
    convert_checkpoint(source, tmp_path / "target")
    model = load_converted(tmp_path / "target", "ForConditionalGeneration")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(tmp_path / "tuned")
    report = convert_checkpoint(tmp_path / "tuned", tmp_path / "back", reverse=True, verify=True)
    assert report.architecture == FAMILIES[family] + "ForConditionalGeneration"
    back = tensors_of(tmp_path / "back")
    original = tensors_of(source)
    assert back.keys() == original.keys()
    shared = next(name for name in back if name.endswith("shared.weight"))
    torch.testing.assert_close(back[shared], original[shared] + 0.01)


@by_family
@pytest.mark.parametrize("head", ["Model", "ForConditionalGeneration", "ForQuestionAnswering"])
def test_a_config_without_architecture_is_recognised_by_its_tensors(tmp_path, family, head):
    source = write_source(tmp_path / "source", family, head)
    config = config_of(source)
    del config["architectures"]
    (source / "config.json").write_text(json.dumps(config))
    report = convert_checkpoint(source, tmp_path / "target", verify=True)
    assert report.architecture == type(load_converted(tmp_path / "target", head)).__name__


@pytest.mark.parametrize("tied", [True, False])
def test_a_native_model_goes_back_to_led(tmp_path, tied):
    model = tiny_seq2seq_model(
        AdaptiveSparseForConditionalGeneration,
        separate_global_projections=True,
        default_global_tokens="none",
        tie_word_embeddings=tied,
    )
    model.save_pretrained(tmp_path / "native")
    report = convert_checkpoint(tmp_path / "native", tmp_path / "back", reverse=True, verify=True)
    assert report.source_model_type == "led"


def test_what_led_has_no_place_for_is_said(tmp_path):
    options = dict(separate_global_projections=True)
    model = tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration, **options)
    model.save_pretrained(tmp_path / "native")
    report = convert_checkpoint(tmp_path / "native", tmp_path / "back", reverse=True)
    assert any("default_global_tokens 'auto' has no place" in note for note in report.notes)
    classifier = tiny_seq2seq_model(AdaptiveSparseSeq2SeqForSequenceClassification, **options)
    classifier.save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match=r"ForSequenceClassification has no counterpart.*'led'"):
        convert_checkpoint(tmp_path / "classifier", tmp_path / "other", reverse=True)


def test_ours_is_not_converted_again(tmp_path):
    source = write_source(tmp_path / "source", "led", "Model")
    convert_checkpoint(source, tmp_path / "target")
    with pytest.raises(ValueError, match="'adaptive_sparse_seq2seq' is ours already; --reverse"):
        convert_checkpoint(tmp_path / "target", tmp_path / "other")


def tokenizer_of(folder, size=100):
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"word{i}" for i in range(size - 4))]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=4096,
    )
    tokenizer.save_pretrained(folder)


def test_tokenizer_and_generation_settings_go_along(tmp_path):
    source = write_source(tmp_path / "source", "led", "ForConditionalGeneration")
    tokenizer_of(source)
    GenerationConfig(num_beams=3, max_length=20, length_penalty=2.0).save_pretrained(source)
    convert_checkpoint(source, tmp_path / "target", max_positions=8192)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "target")
    assert tokenizer("word1 word2")["input_ids"] == [5, 6]
    assert tokenizer.model_max_length == 8192
    model = load_converted(tmp_path / "target", "ForConditionalGeneration")
    assert (model.generation_config.num_beams, model.generation_config.max_length) == (3, 20)


@by_family
def test_generation_settings_in_config_json_become_a_file_and_are_verified(
    tmp_path, family, monkeypatch
):
    source = write_source(tmp_path / "source", family, "ForConditionalGeneration")
    (source / "generation_config.json").unlink()
    settings = dict(num_beams=3, max_length=20, min_length=6, no_repeat_ngram_size=2)
    (source / "config.json").write_text(json.dumps(config_of(source) | settings))
    convert_checkpoint(source, tmp_path / "target", verify=True)
    model = load_converted(tmp_path / "target", "ForConditionalGeneration")
    original = getattr(transformers, FAMILIES[family] + "ForConditionalGeneration")
    original = original.from_pretrained(source).eval()
    assert {name: getattr(model.generation_config, name) for name in settings} == settings
    ids = torch.arange(5, 45)[None]
    assert torch.equal(model.generate(ids), original.generate(ids))
    monkeypatch.setattr(to_adaptive_sparse, "_generation", lambda source: None)
    with pytest.raises(ValueError, match=r"verify: other .* in the generation settings"):
        convert_checkpoint(source, tmp_path / "other", verify=True)
    assert not (tmp_path / "other").exists()


def test_verify_refuses_other_text(tmp_path, monkeypatch):
    source = write_source(tmp_path / "source", "led", "ForConditionalGeneration")
    generate = AdaptiveSparseForConditionalGeneration.generate

    def beams_that_differ(self, *args, num_beams, **kwargs):
        return generate(self, *args, num_beams=num_beams, **kwargs) + (num_beams > 1)

    monkeypatch.setattr(AdaptiveSparseForConditionalGeneration, "generate", beams_that_differ)
    with pytest.raises(ValueError, match="verify: other text with 4 beam"):
        convert_checkpoint(source, tmp_path / "target", verify=True)


def test_model_card_names_the_task_and_the_class(tmp_path):
    source = write_source(tmp_path / "my-led", "led", "ForConditionalGeneration")
    convert_checkpoint(source, tmp_path / "target")
    card = (tmp_path / "target" / "README.md").read_text()
    for text in (
        "pipeline_tag: summarization",
        "LEDForConditionalGeneration",
        "AdaptiveSparseForConditionalGeneration",
        "AutoModelForSeq2SeqLM",
        "4096 tokens",
        "window 64",
    ):
        assert text in card
    assert "$" not in card


LOAD = """
import sys
import torch
import transformers
assert "adaptive_longformer" not in sys.modules
for auto, folder in {folders!r}.items():
    auto = getattr(transformers, auto)
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.arange(5, 45)[None].expand(2, -1)
    before = model(ids, return_dict=False)[0]
    model.save_pretrained(folder + "-saved")
    again = auto.from_pretrained(folder + "-saved", trust_remote_code=True).eval()
    assert torch.equal(again(ids, return_dict=False)[0], before)
    assert type(model) is type(again)
    assert type(model).__module__.startswith("adaptive_longformer."), type(model)
    assert type(model.config).__name__ == "AdaptiveSparseSeq2SeqConfig"
"""


def test_auto_classes_load_converted_folders_without_our_import(tmp_path):
    folders = {}
    for auto, head in (
        ("AutoModelForSeq2SeqLM", "ForConditionalGeneration"),
        ("AutoModelForQuestionAnswering", "ForQuestionAnswering"),
    ):
        source = write_source(tmp_path / ("source" + head), "led", head)
        convert_checkpoint(source, tmp_path / head)
        folders[auto] = str(tmp_path / head)
    environment = dict(os.environ, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    done = subprocess.run(
        [sys.executable, "-c", LOAD.format(folders=folders)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for folder in folders.values():
        for part in ("configuration", "modeling"):
            name = f"{part}_adaptive_sparse_seq2seq.py"
            saved = os.path.join(folder + "-saved", name)
            with open(saved) as one, open(os.path.join(folder, name)) as other:
                assert one.read() == other.read()


def test_half_precision_checkpoint_generates_after_conversion(tmp_path):
    source_model("led", "ForConditionalGeneration").to(torch.bfloat16).save_pretrained(
        tmp_path / "source"
    )
    convert_checkpoint(tmp_path / "source", tmp_path / "target")
    model = load_converted(tmp_path / "target", "ForConditionalGeneration")
    assert model.dtype == torch.bfloat16
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        expected = model.float()(ids, decoder_input_ids=ids[:, :5]).logits
        found = model.bfloat16()(ids, decoder_input_ids=ids[:, :5]).logits.float()
    assert in_tolerances([expected], [found]) < 0.1 / 1e-5
    assert model.generate(ids, max_new_tokens=4).shape[0] == 1
