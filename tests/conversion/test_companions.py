"""What goes along beside the weights: as it was, and nothing that runs or lies elsewhere."""

import json
import shutil

import pytest
import torch
from checkpoints import load_converted, write_source
from safetensors.torch import load_file
from seq2seq_checkpoints import write_source as write_seq2seq
from test_convert import bert_tokenizer
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, RobertaTokenizer

from adaptive_longformer.conversion import source as source_module
from adaptive_longformer.conversion.convert import convert_checkpoint


@pytest.fixture
def source(tmp_path):
    folder = write_source(tmp_path / "source", "roberta", "Model", max_position_embeddings=66)
    text = ["the court finds that the dog is not liable"] * 3
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(text, vocab_size=280, special_tokens=special)
    bpe.save_model(str(folder))
    tokenizer = RobertaTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=64
    )
    tokenizer.add_tokens(["[clause]"])
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


KIND = "sentence_transformers.models."


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_the_tokenizer_with_added_tokens_and_chat_template_is_as_it_was(tmp_path, source):
    convert_checkpoint(source, tmp_path / "target")
    before, after = (AutoTokenizer.from_pretrained(tmp_path / x) for x in ("source", "target"))
    assert type(after) is type(before)
    text = "the dog [clause] liable"
    assert "[clause]" in after.tokenize(text)
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.get_vocab() == before.get_vocab()
    assert after.chat_template == before.chat_template is not None


@pytest.mark.parametrize("tokenizer_class", ["GPT2Tokenizer", "RobertaTokenizer", None])
@pytest.mark.parametrize("family", ["bigbird_pegasus", "led"])
def test_autotokenizer_takes_the_class_that_it_takes_for_the_source(
    tmp_path, source, family, tokenizer_class
):
    folder = write_seq2seq(tmp_path / family, family, "Model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    edit(folder / "tokenizer_config.json", tokenizer_class=tokenizer_class)
    if tokenizer_class is None:
        (folder / "tokenizer_config.json").unlink()
    convert_checkpoint(folder, tmp_path / "target")
    before, after = (AutoTokenizer.from_pretrained(x) for x in (folder, tmp_path / "target"))
    assert type(after) is type(before)
    assert after("the dog [clause]")["input_ids"] == before("the dog [clause]")["input_ids"]


@pytest.mark.parametrize(
    ("stated", "max_positions", "expected"),
    [(None, None, 64), (None, 128, 128), (10**30, None, 64), (48, None, 48), (48, 128, 128)],
)
def test_the_tokenizer_cuts_at_what_the_model_reads(
    tmp_path, source, stated, max_positions, expected
):
    if stated is None:
        (source / "tokenizer_config.json").unlink()
    else:
        edit(source / "tokenizer_config.json", model_max_length=stated)
    convert_checkpoint(source, tmp_path / "target", max_positions=max_positions)
    before, after = (AutoTokenizer.from_pretrained(tmp_path / x) for x in ("source", "target"))
    assert type(after) is type(before)
    assert after.model_max_length == expected
    found = after("the dog " * 100, truncation=True)["input_ids"]
    assert found == before("the dog " * 100, truncation=True, max_length=expected)["input_ids"]


def test_no_python_file_and_no_name_of_one_reaches_the_target(tmp_path, source):
    for name in ("tokenizer_mine.py", "vocab.py", "tokenization_mine.py", "tokenizer.pkl"):
        (source / name).write_text("raise SystemExit")
    edit(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Mine", None]})
    edit(source / "config.json", auto_map={"AutoModel": "mine.Mine"})
    report = convert_checkpoint(source, tmp_path / "target")
    for name in ("config.json", "tokenizer_config.json"):
        assert any(note.startswith(f"{name} of the source names Python") for note in report.notes)
    ours = {"configuration_adaptive_sparse.py", "modeling_adaptive_sparse.py"}
    assert {file.name for file in (tmp_path / "target").glob("*.p*")} == ours
    assert "auto_map" not in json.loads((tmp_path / "target" / "tokenizer_config.json").read_text())
    assert "mine.Mine" not in (tmp_path / "target" / "config.json").read_text()


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "config.json", "model.safetensors", "chat_template.jinja", "README.md"],
)
def test_links_out_of_the_folder_are_refused_by_name(tmp_path, source, name):
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    (source / name).rename(tmp_path / "elsewhere")
    (source / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"{name} is a link out of the folder"):
        convert_checkpoint(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_links_inside_the_folder_and_into_the_blobs_of_the_hubs_cache_are_followed(
    tmp_path, source
):
    snapshot = tmp_path / "models--some--one" / "snapshots" / "0123"
    blobs = tmp_path / "models--some--one" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "vocab.json").rename(snapshot / "words")
    (snapshot / "vocab.json").symlink_to("words")
    convert_checkpoint(snapshot, tmp_path / "target")
    files = list((tmp_path / "target").iterdir())
    assert not any(file.is_symlink() for file in files)
    assert {"tokenizer.json", "vocab.json", "model.safetensors"} <= {file.name for file in files}


def sentence_transformer(folder, **pooling):
    """What sentence-transformers adds to the folder of a model: CLS pooling, a layer, norm 1."""
    kinds = {
        "": "Transformer",
        "1_Pooling": "Pooling",
        "2_Dense": "Dense",
        "3_Normalize": "Normalize",
    }
    modules = [
        dict(idx=index, name=str(index), path=path, type=f"sentence_transformers.models.{kind}")
        for index, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 64}')
    (folder / "config_sentence_transformers.json").write_text('{"prompts": {}}')
    for path, content in (
        ("1_Pooling", dict(word_embedding_dimension=32, pooling_mode_cls_token=True) | pooling),
        ("2_Dense", dict(in_features=32, out_features=8, bias=False)),
    ):
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps(content))
    torch.save({"linear.weight": torch.randn(8, 32)}, folder / "2_Dense" / "pytorch_model.bin")
    (folder / "2_Dense" / "mine.py").write_text("raise SystemExit")
    return folder


def test_a_sentence_transformers_folder_keeps_its_modules(tmp_path):
    source = write_source(tmp_path / "source", "bert", "Model", max_position_embeddings=64)
    bert_tokenizer(source)
    sentence_transformer(source)
    report = convert_checkpoint(source, tmp_path / "target", max_positions=256, verify=True)
    target = tmp_path / "target"
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/config.json"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert (target / "3_Normalize").is_dir()
    assert (target / "config_sentence_transformers.json").is_file()
    limit = json.loads((target / "sentence_bert_config.json").read_text())["max_seq_length"]
    assert limit == AutoTokenizer.from_pretrained(target).model_max_length == 256
    expected = torch.load(source / "2_Dense" / "pytorch_model.bin")
    found = load_file(target / "2_Dense" / "model.safetensors")
    assert torch.equal(found["linear.weight"], expected["linear.weight"])
    assert sorted(file.name for file in (target / "2_Dense").iterdir()) == [
        "config.json", "model.safetensors",
    ]  # fmt: skip
    assert any("import adaptive_longformer" in note for note in report.notes)
    assert load_converted(target, "Model").config.max_sequence_length == 256


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            {"path": "", "type": "mine.Module"},
            "'mine.Module', which is not of sentence-transformers",
        ),
        ({"path": "../up", "type": "sentence_transformers.models.Pooling"}, "a module's path"),
        ({"path": "/etc", "type": "sentence_transformers.models.Pooling"}, "a module's path"),
        ({"path": "0_T", "type": "sentence_transformers.models.Transformer"}, "the model in 0_T"),
        (["path"], "a module's path"),
    ],
)
def test_modules_that_cannot_be_taken_over_are_named(tmp_path, source, module, message):
    (source / "modules.json").write_text(json.dumps([module]))
    with pytest.raises(ValueError, match=rf"modules.json .*{message}"):
        convert_checkpoint(source, tmp_path / "target")


def test_hub_ids_of_sentence_transformers_and_adapters_are_recognised(tmp_path, monkeypatch):
    cache = tmp_path / "cache"

    def repository(name):
        folder = cache / f"models--some--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        return folder / "snapshots" / ("0" * 40)

    sentences = repository("sentences")
    write_source(sentences, "bert", "Model", max_position_embeddings=64)
    sentence_transformer(sentences)
    adapter = repository("adapter")
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    fetched = []

    def fetch(name, file, **options):
        fetched.append(file)
        repository = cache / f"models--{name.replace('/', '--')}"
        path = repository / "snapshots" / ("0" * 40) / file
        return str(path) if path.is_file() else None

    monkeypatch.setattr(source_module, "cached_file", fetch)
    convert_checkpoint("some/sentences", tmp_path / "target")
    assert {"1_Pooling/config.json", "2_Dense/pytorch_model.bin"} <= set(fetched)
    assert (tmp_path / "target" / "1_Pooling" / "config.json").is_file()
    with pytest.raises(ValueError, match="adapter of PEFT"):
        convert_checkpoint("some/adapter", tmp_path / "other")
