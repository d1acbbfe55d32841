import json
import shutil

import pytest
import torch
import transformers
from checkpoints import (
    FAMILIES,
    HEADS,
    load_converted,
    randomize,
    source_config,
    write_source,
)
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertTokenizer, BigBirdForPreTraining, BigBirdTokenizer

from adaptive_longformer.conversion import source as source_module
from adaptive_longformer.conversion.convert import convert_checkpoint
from adaptive_longformer.conversion.families import FAMILIES as TABLES
from adaptive_longformer.conversion.positions import is_tiled, tile_positions

POOLED_FOR_NOTHING = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", HEADS)
def test_verify_finds_equal_logits(tmp_path, family, head):
    steps = []
    source = write_source(tmp_path / "source", family, head)
    report = convert_checkpoint(
        source, tmp_path / "target", verify=True, progress=lambda *step: steps.append(step)
    )
    assert report.max_logit_difference is not None
    assert report.max_logit_difference < 1e-4
    assert report.source_model_type == family
    assert report.architecture == "AdaptiveSparse" + head
    # Most heads of BigBird carry a pooler along that they do not read.
    has_idle_pooler = family == "big_bird" and head in POOLED_FOR_NOTHING
    assert report.num_parameters == has_idle_pooler * (32 * 32 + 32) + sum(
        parameter.numel() for parameter in load_converted(tmp_path / "target", head).parameters()
    )
    files = list((tmp_path / "target").iterdir())
    assert report.size_bytes == sum(path.stat().st_size for path in files)
    assert {stage for stage, _, _ in steps} == {"weights", "verifying"}


def test_tables_are_reversible():
    for family in TABLES.values():
        for source_name, ours in family.table.rows:
            names = dict(layer="11", parameter="weight")
            found = family.table.to_target(source_name.format(**names))
            assert found == ours.format(**names)
            back = family.table.to_source(found)
            assert family.table.to_target(back) == found


def test_tiling_keeps_the_rows_before_the_first_position():
    table = torch.arange(6.0)[:, None]
    tiled = tile_positions(table, 12, 2)
    assert tiled[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 2, 3]
    assert is_tiled(tiled, 6, 2)
    tiled[11] += 1
    assert not is_tiled(tiled, 6, 2)
    assert torch.equal(tile_positions(table, 6, 2), table)


def bert_tokenizer(folder, vocab_size=100):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = special + [f"word{i}" for i in range(vocab_size - len(special))]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), model_max_length=512)
    tokenizer.save_pretrained(folder)


def test_the_tokenizer_goes_along_and_reads_the_new_length(tmp_path):
    source = write_source(tmp_path / "source", "bert", "ForSequenceClassification")
    (source / "generation_config.json").write_text("{}")
    report = convert_checkpoint(source, tmp_path / "without")
    assert any("the source has no tokenizer" in note for note in report.notes)
    bert_tokenizer(source)
    (source / "training_args.bin").write_text("not ours")
    report = convert_checkpoint(source, tmp_path / "target", max_positions=1024)
    assert not any("no tokenizer" in note for note in report.notes)
    expected, found = (AutoTokenizer.from_pretrained(tmp_path / x) for x in ("source", "target"))
    assert type(found) is type(expected)
    text = "word1 word2 nothing word9"
    assert found(text)["input_ids"] == expected(text)["input_ids"]
    assert (expected.model_max_length, found.model_max_length) == (512, 1024)
    assert (tmp_path / "target" / "generation_config.json").exists()
    assert not (tmp_path / "target" / "training_args.bin").exists()
    config = load_converted(tmp_path / "target", "ForSequenceClassification").config
    assert (config.cls_token_id, config.sep_token_id) == (2, 3)
    convert_checkpoint(tmp_path / "target", tmp_path / "back", reverse=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "back").model_max_length == 512


def test_a_pre_training_checkpoint_of_big_bird_gives_its_masked_language_model(tmp_path):
    model = randomize(BigBirdForPreTraining(source_config("big_bird")))
    model.save_pretrained(tmp_path / "source")
    report = convert_checkpoint(tmp_path / "source", tmp_path / "target", verify=True)
    assert report.architecture == "AdaptiveSparseForMaskedLM"
    assert any("cls.seq_relationship.weight" in note for note in report.notes)
    convert_checkpoint(tmp_path / "target", tmp_path / "back", reverse=True)
    again = BigBirdForPreTraining.from_pretrained(tmp_path / "back")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_the_tokenizer_of_big_bird_goes_along(tmp_path):
    source = write_source(tmp_path / "source", "big_bird", "ForQuestionAnswering")
    special = ["<pad>", "<s>", "</s>", "[SEP]", "[CLS]", "[MASK]"]
    words = [(name, 0.0) for name in (*special, "<unk>", "\u2581word", "\u2581other")]
    BigBirdTokenizer(words, model_max_length=512).save_pretrained(source)
    convert_checkpoint(source, tmp_path / "target", max_positions=1024)
    expected, found = (AutoTokenizer.from_pretrained(tmp_path / x) for x in ("source", "target"))
    assert type(found) is type(expected)
    assert found("word other", "word")["input_ids"] == expected("word other", "word")["input_ids"]
    assert (expected.model_max_length, found.model_max_length) == (512, 1024)
    config = load_converted(tmp_path / "target", "ForQuestionAnswering").config
    assert (config.cls_token_id, config.sep_token_id) == (4, 3)


def test_the_model_card_says_where_the_weights_come_from(tmp_path):
    source = write_source(tmp_path / "my-roberta", "roberta", "ForTokenClassification")
    (source / "README.md").write_text("---\nlicense: mit\n---\n# mine\n")
    options = dict(max_positions=2048, attention_window=128, verify=True)
    report = convert_checkpoint(source, tmp_path / "long", **options)
    card = (tmp_path / "long" / "README.md").read_text()
    for text in (
        "library_name: transformers",
        "pipeline_tag: token-classification",
        "license: mit",
        "`my-roberta`",
        "RobertaForTokenClassification",
        "AutoModelForTokenClassification",
        "2048 tokens",
        "window 128",
        f"{report.max_logit_difference:.2g}",
        "equal up to 65 tokens",
        *report.notes,
    ):
        assert text in card
    assert "$" not in card and "pip install ." in card


def test_labels_and_dropouts_are_taken_over(tmp_path):
    source = write_source(
        tmp_path / "source",
        "roberta",
        "ForSequenceClassification",
        classifier_dropout=0.3,
        id2label={0: "no", 1: "yes", 2: "maybe"},
        hidden_dropout_prob=0.2,
        problem_type="single_label_classification",
    )
    convert_checkpoint(source, tmp_path / "target")
    config = load_converted(tmp_path / "target", "ForSequenceClassification").config
    assert config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert (config.classifier_dropout, config.hidden_dropout_prob) == (0.3, 0.2)
    assert config.problem_type == "single_label_classification"
    assert config.source_config == json.loads((source / "config.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_131072_positions(tmp_path, family):
    source = write_source(tmp_path / "source", family, "Model")
    convert_checkpoint(source, tmp_path / "target", max_positions=131072)
    model = load_converted(tmp_path / "target", "Model")
    assert model.config.max_sequence_length == 131072
    assert model.embeddings.position_embeddings.weight.shape[0] - 131072 in (0, 2)


def test_a_hub_id_is_read_from_the_cache_when_offline(tmp_path, monkeypatch):
    source = write_source(tmp_path / "source", "longformer", "ForMaskedLM")
    bert_tokenizer(source)
    repository = tmp_path / "cache" / "models--someone--small-longformer"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(source, repository / "snapshots" / ("0" * 40))
    fetch = source_module.cached_file
    monkeypatch.setattr(
        source_module,
        "cached_file",
        lambda *args, **kwargs: fetch(
            *args, cache_dir=str(tmp_path / "cache"), local_files_only=True, **kwargs
        ),
    )
    report = convert_checkpoint("someone/small-longformer", tmp_path / "target", verify=True)
    assert report.source == "someone/small-longformer"
    card = (tmp_path / "target" / "README.md").read_text()
    assert "base_model: someone/small-longformer" in card
    assert (tmp_path / "target" / "vocab.txt").exists()
    with pytest.raises(FileNotFoundError, match="someone/other"):
        convert_checkpoint("someone/other", tmp_path / "other")


def test_a_relative_target_and_new_parents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write_source(tmp_path / "source", "longformer", "Model")
    report = convert_checkpoint(source, "new/folders/target")
    assert report.target == str(tmp_path / "new" / "folders" / "target")
    assert [path.name for path in (tmp_path / "new" / "folders").iterdir()] == ["target"]


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForSequenceClassification"])
@pytest.mark.parametrize("prefix", ["XLMRoberta", "Camembert"])
def test_roberta_under_other_names_converts_and_comes_back(tmp_path, prefix, head):
    fields = source_config("roberta", num_labels=3, max_position_embeddings=66).to_dict()
    del fields["model_type"], fields["architectures"]
    config = getattr(transformers, prefix + "Config")(**fields)
    source = randomize(getattr(transformers, prefix + head)(config))
    source.save_pretrained(tmp_path / "source")
    report = convert_checkpoint(tmp_path / "source", tmp_path / "target", verify=True)
    assert report.architecture == "AdaptiveSparse" + head
    report = convert_checkpoint(tmp_path / "target", tmp_path / "back", reverse=True, verify=True)
    assert report.architecture == prefix + head
    expected, found = (load_file(tmp_path / x / "model.safetensors") for x in ("source", "back"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    ("family", "head"),
    [
        (family, head)
        for family in FAMILIES
        for head in HEADS
        if (family, head) != ("bert", "ForMultipleChoice")  # as a classifier of one class
    ],
)
def test_an_unknown_class_is_decided_by_the_tensors(tmp_path, family, head):
    source = write_source(tmp_path / "source", family, head)
    config = json.loads((source / "config.json").read_text())
    config["architectures"] = ["MyDreamingModel"]
    (source / "config.json").write_text(json.dumps(config))
    report = convert_checkpoint(source, tmp_path / "target")
    assert report.architecture == "AdaptiveSparse" + head
    named = "'MyDreamingModel', which is none that converts; the tensors are those of "
    assert any(named + FAMILIES[family] + head in note for note in report.notes)


@pytest.mark.parametrize(("family", "is_said"), [("bert", True), ("longformer", False)])
def test_repeated_positions_are_said_to_lead_an_untrained_selection(tmp_path, family, is_said):
    source = write_source(tmp_path / "source", family, "Model")
    report = convert_checkpoint(source, tmp_path / "short")
    assert not any("adaptive selection" in note for note in report.notes)
    report = convert_checkpoint(source, tmp_path / "long", max_positions=8192)
    assert any("adaptive selection" in note for note in report.notes) == is_said
