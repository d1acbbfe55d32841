import json

import pytest
import torch
from checkpoints import FAMILIES, HEADS, load_converted, source_config, source_model, write_source
from safetensors.torch import load_file, save_file
from torch import nn

from adaptive_longformer.conversion import checkpoint as checkpoint_module
from adaptive_longformer.conversion.checkpoint import Checkpoint
from adaptive_longformer.conversion.convert import convert_checkpoint


def tensors_of(folder):
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.load(name) for name in checkpoint.tensors}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def assert_identical(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


def there_and_back(source, folder, **options):
    convert_checkpoint(source, folder / "target", **options)
    return convert_checkpoint(folder / "target", folder / "back", reverse=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_config_come_back_bit_for_bit(tmp_path, family, head, dtype):
    source_model(family, head).to(dtype).save_pretrained(tmp_path / "source")
    there_and_back(tmp_path / "source", tmp_path)
    assert_identical(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "source"))
    assert config_of(tmp_path / "back") == config_of(tmp_path / "source")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "target").values()} == {dtype}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_extended_position_table_is_cut_back(tmp_path, family):
    config = source_config(family, max_position_embeddings=66)
    source = write_source(tmp_path / "source", family, "ForMaskedLM", max_position_embeddings=66)
    offset = 0 if family in ("bert", "big_bird") else 2
    options = {} if family == "big_bird" else dict(attention_window=64)
    convert_checkpoint(source, tmp_path / "target", max_positions=1000, **options)
    table = tensors_of(tmp_path / "target")["model.embeddings.position_embeddings.weight"]
    usable = config.max_position_embeddings - offset
    assert table.shape[0] == 1000 + offset
    repeated = table[offset + usable : offset + 2 * usable]
    assert torch.equal(repeated, table[offset : offset + usable])
    assert load_converted(tmp_path / "target", "ForMaskedLM").config.max_sequence_length == 1000
    convert_checkpoint(tmp_path / "target", tmp_path / "back", reverse=True)
    assert_identical(tensors_of(tmp_path / "back"), tensors_of(source))
    assert config_of(tmp_path / "back") == config_of(source)


def test_a_trained_position_table_is_not_cut(tmp_path):
    source = write_source(tmp_path / "source", "roberta", "Model", max_position_embeddings=66)
    convert_checkpoint(source, tmp_path / "target", max_positions=100)
    model = load_converted(tmp_path / "target", "Model")
    with torch.no_grad():
        model.embeddings.position_embeddings.weight[101] += 1
    model.save_pretrained(tmp_path / "trained")
    convert_checkpoint(tmp_path / "trained", tmp_path / "back", reverse=True)
    assert config_of(tmp_path / "back")["max_position_embeddings"] == 102
    found = tensors_of(tmp_path / "back")["embeddings.position_embeddings.weight"]
    assert torch.equal(found, model.embeddings.position_embeddings.weight)


def test_duplicates_buffers_and_unknown_tensors_come_back(tmp_path):
    source = write_source(tmp_path / "source", "bert", "ForMaskedLM")
    tensors = load_file(source / "model.safetensors")
    words = tensors["bert.embeddings.word_embeddings.weight"]
    tensors["cls.predictions.decoder.weight"] = words.clone()
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    tensors["bert.embeddings.position_ids"] = torch.arange(512)[None]
    tensors["bert.pooler.dense.weight"] = torch.randn(32, 32)
    tensors["bert.pooler.dense.bias"] = torch.randn(32)
    tensors["cls.seq_relationship.weight"] = torch.randn(2, 32)
    for old, new in (("weight", "gamma"), ("bias", "beta")):
        prefix = "bert.embeddings.LayerNorm."
        tensors[prefix + new] = tensors.pop(prefix + old)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(source, tmp_path / "target", verify=True)
    converted = tensors_of(tmp_path / "target")
    assert "lm_head.decoder.weight" not in converted
    assert "model.pooler.dense.weight" in converted
    report = convert_checkpoint(tmp_path / "target", tmp_path / "back", reverse=True, verify=True)
    assert report.max_logit_difference is not None
    assert_identical(tensors_of(tmp_path / "back"), tensors)


def test_tied_weights_that_differ_are_kept_apart(tmp_path):
    source = write_source(tmp_path / "source", "roberta", "ForMaskedLM")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.decoder.weight"] = torch.randn(100, 32)
    tensors["lm_head.decoder.bias"] = torch.randn(100)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = convert_checkpoint(source, tmp_path / "target", verify=True)
    assert any("differs from the word embeddings" in note for note in report.notes)
    convert_checkpoint(tmp_path / "target", tmp_path / "back", reverse=True)
    assert_identical(tensors_of(tmp_path / "back"), tensors)
    assert config_of(tmp_path / "back") == config_of(source)


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_checkpoints_are_read(tmp_path, zipped):
    source = write_source(tmp_path / "source", "longformer", "ForMaskedLM")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.decoder.weight"] = tensors["longformer.embeddings.word_embeddings.weight"]
    torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (source / "model.safetensors").unlink()
    there_and_back(source, tmp_path, verify=True)
    assert_identical(tensors_of(tmp_path / "back"), tensors)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_read_and_written(tmp_path, monkeypatch, kind):
    source = write_source(tmp_path / "whole", "roberta", "ForMaskedLM")
    expected = tensors_of(source)
    if kind == "safetensors":
        model = source_model("roberta", "ForMaskedLM")
        model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
        assert (tmp_path / "source" / "model.safetensors.index.json").exists()
    else:
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "config.json").write_text((source / "config.json").read_text())
        weight_map = {name: f"pytorch_model-{i % 3}.bin" for i, name in enumerate(expected)}
        for file in set(weight_map.values()):
            part = {name: expected[name] for name in expected if weight_map[name] == file}
            torch.save(part, tmp_path / "source" / file)
        index = {"metadata": {}, "weight_map": weight_map}
        (tmp_path / "source" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    monkeypatch.setattr(checkpoint_module, "MAX_SHARD_SIZE", 20_000)
    there_and_back(tmp_path / "source", tmp_path, verify=True)
    assert len(list((tmp_path / "target").glob("model-*.safetensors"))) > 1
    assert_identical(tensors_of(tmp_path / "back"), expected)


def test_a_fine_tuned_model_goes_back_with_its_new_head(tmp_path):
    source = write_source(tmp_path / "source", "longformer", "ForMaskedLM")
    convert_checkpoint(source, tmp_path / "target")
    model = type(load_converted(tmp_path / "target", "ForTokenClassification")).from_pretrained(
        tmp_path / "target", num_labels=5
    )
    nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path / "tuned")
    report = convert_checkpoint(tmp_path / "tuned", tmp_path / "back", reverse=True, verify=True)
    assert report.architecture == "LongformerForTokenClassification"
    assert len(config_of(tmp_path / "back")["id2label"]) == 5
    assert torch.equal(tensors_of(tmp_path / "back")["classifier.weight"], model.classifier.weight)


def test_a_native_model_goes_back_to_the_family_it_fits(tmp_path):
    from adaptive_longformer.testing import tiny_model

    tiny_model(separate_global_projections=True).save_pretrained(tmp_path / "native")
    report = convert_checkpoint(tmp_path / "native", tmp_path / "back", reverse=True)
    assert report.source_model_type == "longformer"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_without_its_head_is_converted_and_said_so(tmp_path, family):
    write_source(tmp_path / "source", family, "Model")
    config = config_of(tmp_path / "source")
    config["architectures"] = [FAMILIES[family] + "ForSequenceClassification"]
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    report = convert_checkpoint(tmp_path / "source", tmp_path / "target", verify=True)
    assert report.architecture == "AdaptiveSparseForSequenceClassification"
    assert any("newly initialised" in note for note in report.notes)
    convert_checkpoint(tmp_path / "target", tmp_path / "back", reverse=True)
    assert_identical(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "source"))


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM", "ForSequenceClassification"])
def test_a_config_without_architecture_is_recognised_by_its_tensors(tmp_path, head):
    source = write_source(tmp_path / "source", "longformer", head)
    config = config_of(source)
    del config["architectures"]
    (source / "config.json").write_text(json.dumps(config))
    report = convert_checkpoint(source, tmp_path / "target", verify=True)
    assert report.architecture == "AdaptiveSparse" + head
    convert_checkpoint(tmp_path / "target", tmp_path / "back", reverse=True)
    assert config_of(tmp_path / "back") == config
    assert_identical(tensors_of(tmp_path / "back"), tensors_of(source))


def test_a_causal_model_comes_back_bit_for_bit(tmp_path):
    source = write_source(tmp_path / "source", "big_bird", "ForCausalLM", is_decoder=True)
    there_and_back(source, tmp_path, verify=True)
    assert_identical(tensors_of(tmp_path / "back"), tensors_of(source))
    assert config_of(tmp_path / "back") == config_of(source)


def test_an_encoder_fine_tuned_as_a_causal_model_goes_back_as_a_decoder(tmp_path):
    source = write_source(tmp_path / "source", "big_bird", "ForMaskedLM")
    convert_checkpoint(source, tmp_path / "target")
    model = load_converted(tmp_path / "target", "ForCausalLM", attention_pattern="full")
    model.save_pretrained(tmp_path / "tuned")
    report = convert_checkpoint(tmp_path / "tuned", tmp_path / "back", reverse=True)
    assert report.architecture == "BigBirdForCausalLM"
    assert config_of(tmp_path / "back")["is_decoder"] is True
    assert any("attention_pattern 'full'" in note for note in report.notes)


def test_a_trained_big_bird_goes_back_without_its_training_step(tmp_path):
    source = write_source(tmp_path / "source", "big_bird", "ForMaskedLM")
    convert_checkpoint(source, tmp_path / "target")
    model = load_converted(tmp_path / "target", "ForMaskedLM").train()
    model(torch.arange(5, 85).repeat(3)[None])
    model.save_pretrained(tmp_path / "tuned")
    report = convert_checkpoint(tmp_path / "tuned", tmp_path / "back", reverse=True, verify=True)
    assert any("random_step" in note for note in report.notes)
