"""Every mistake ends in one clear error, and nothing is left behind."""

import errno
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from random import Random

import pytest
import torch
from checkpoints import write_source
from safetensors.torch import load_file, save_file
from seq2seq_checkpoints import write_source as write_seq2seq
from transformers import GPT2Config, GPT2LMHeadModel

from adaptive_longformer.conversion import checkpoint as checkpoint_module
from adaptive_longformer.conversion import convert as convert_module
from adaptive_longformer.conversion import source as source_module
from adaptive_longformer.conversion.convert import convert_checkpoint
from adaptive_longformer.conversion.verify import Agreement


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "source", "longformer", "ForMaskedLM", attention_window=32)


def assert_refused(tmp_path, source, error, *words, target="target", **options):
    """Conversion raises; the message is one line with some words; no file appears beside it."""
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(error) as caught:
        convert_checkpoint(source, tmp_path / target, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/no/where", "some-org/a-model", "a b"])
def test_missing_source(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    fetch = functools.partial(source_module.cached_file, local_files_only=True)
    monkeypatch.setattr(source_module, "cached_file", fetch)
    assert_refused(tmp_path, name, FileNotFoundError, "source", name)


def test_folder_without_config_or_weights(tmp_path, source):
    (source / "model.safetensors").unlink()
    assert_refused(tmp_path, source, FileNotFoundError, "no weights", "model.safetensors")
    (source / "config.json").unlink()
    assert_refused(tmp_path, source, FileNotFoundError, "config.json")


def test_source_that_is_a_file(tmp_path, source):
    assert_refused(tmp_path, source / "config.json", FileNotFoundError, "is a file")


def test_big_bird_of_no_known_attention(tmp_path):
    source = write_source(tmp_path / "source", "big_bird", "ForMaskedLM")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "attention_type": ""}))
    assert_refused(tmp_path, source, ValueError, "attention_type is ''", "'block_sparse'")


def test_other_family(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)).save_pretrained(
        tmp_path / "gpt2"
    )
    words = ("'gpt2'", "bert, big_bird, bigbird_pegasus, camembert, led, longformer, roberta")
    assert_refused(tmp_path, tmp_path / "gpt2", ValueError, *words)


def test_decoders(tmp_path):
    source = write_source(tmp_path / "source", "bert", "Model")
    edit_config(source, is_decoder=True)
    assert_refused(tmp_path, source, ValueError, "is_decoder", "encoders")


def edit_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"model_type": 3}', "{}", "\xff", '{"model_type": ["longformer"]}']
    + ["[" * depth + "]" * depth for depth in (100, 100_000)]
    + ['{"a": ' * 500 + "1" + "}" * 500, '{"model_type": ' + "9" * 5000 + "}"],
)
def test_damaged_config(tmp_path, source, content):
    (source / "config.json").write_bytes(content.encode("latin-1"))
    assert_refused(tmp_path, source, ValueError, "source")


def test_config_with_a_wrong_type(tmp_path, source):
    edit_config(source, hidden_size="wide")
    with pytest.raises(ValueError, match="hidden_size"):
        convert_checkpoint(source, tmp_path / "target")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", "LongformerModel"),
        ("architectures", [["LongformerModel"]]),
        ("architectures", {"0": "LongformerModel"}),
        ("id2label", ["a", "b"]),
        ("id2label", {"a": {}}),
        ("dtype", "float33"),
        ("attention_window", {"a": 1}),
        ("attention_window", [[32], [32]]),
        ("attention_window", []),
        ("pad_token_id", [1]),
        ("hidden_act", ["gelu"]),
        ("hidden_act", "x" * 10**6),
        ("position_embedding_type", ["absolute"]),
        ("tie_word_embeddings", "no"),
        ("num_hidden_layers", True),
        ("layer_norm_eps", None),
        ("initializer_range", -1.0),
        ("initializer_range", float("inf")),
        ("initializer_range", float("nan")),
        # Terabytes, if they were allocated.
        ("num_hidden_layers", 10**9),
        ("num_labels", 10**12),
        ("hidden_size", 2**50),
        ("intermediate_size", 2**50),
        ("vocab_size", 2**50),
        ("max_position_embeddings", 2**50),
        ("type_vocab_size", 2**50),
        ("attention_window", 2**63),
    ],
)
def test_fields_of_a_wrong_shape_are_named_at_once(tmp_path, source, field, value):
    edit_config(source, **{field: value})
    started = time.process_time()
    with pytest.raises(ValueError, match=r"config\.json|" + field) as caught:
        convert_checkpoint(source, tmp_path / "target", attention_window=None)
    assert time.process_time() - started < 1
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", {"added_tokens": [1, 2]}),
        ("tokenizer.json", {"added_tokens": {"content": []}}),
        ("tokenizer.json", [1]),
        ("tokenizer_config.json", [1]),
        ("sentence_bert_config.json", [1]),
        ("modules.json", {"path": ""}),
        ("generation_config.json", "{"),
        ("added_tokens.json", "[" * 70 + "]" * 70),
    ],
)
def test_files_beside_the_weights_of_a_wrong_shape_are_named(tmp_path, file, content):
    source = write_source(tmp_path / "source", "bert", "Model")
    (source / "tokenizer.json").write_text("{}")
    (source / file).write_text(content if isinstance(content, str) else json.dumps(content))
    assert_refused(tmp_path, source, ValueError, file)


@pytest.mark.parametrize(
    "shard",
    [3, ["a"], None, "", ".", "..", "../model.safetensors", "/etc/passwd", "a/b", "C:\\a"],
)
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_that_names_anything_but_a_file_beside_it(tmp_path, source, index, shard):
    (source / "model.safetensors").rename(tmp_path / "model.safetensors")
    (source / index).write_text(json.dumps({"weight_map": {"a": shard}}))
    assert_refused(tmp_path, source, ValueError, index, repr(shard))


@pytest.mark.parametrize(
    "name", ["a\nmax |logit difference|: 0", "\x1b[31mred", "[link](http://x)", "a" * 501, ""]
)
def test_tensor_names_that_would_forge_a_report_are_refused(tmp_path, source, name):
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {name: torch.zeros(1)}, source / "model.safetensors")
    assert_refused(tmp_path, source, ValueError, "model.safetensors", "names a tensor")


def test_an_adapter_is_named_as_such(tmp_path, source):
    (source / "model.safetensors").rename(source / "adapter_model.safetensors")
    (source / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert_refused(tmp_path, source, ValueError, "adapter of PEFT", "merge_and_unload")
    (source / "config.json").unlink()
    assert_refused(tmp_path, source, ValueError, "adapter of PEFT", "merge_and_unload")


def test_config_of_another_size(tmp_path, source):
    edit_config(source, intermediate_size=64)
    assert_refused(tmp_path, source, ValueError, "intermediate.dense.weight", "[128, 32]")
    edit_config(source, intermediate_size=128, num_hidden_layers=3, attention_window=32)
    assert_refused(tmp_path, source, ValueError, "encoder.layer.2", "missing")


@pytest.mark.parametrize("keep", [0, 4, 1000, -100])
def test_truncated_safetensors(tmp_path, source, keep):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert_refused(tmp_path, source, ValueError, "model.safetensors", "truncated")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0, 10, 1000, -100])
def test_truncated_bin(tmp_path, source, keep, zipped):
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    file = source / "pytorch_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(file.read_bytes()[:keep])
    assert_refused(tmp_path, source, ValueError, "pytorch_model.bin", "truncated")


class Runs:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_bin_with_code_is_refused_and_not_run(tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (source / "model.safetensors").unlink()
    torch.save({"weights": Runs()}, source / "pytorch_model.bin")
    assert_refused(tmp_path, source, ValueError, "pytorch_model.bin")


def test_missing_shard(tmp_path, source):
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002.safetensors"}
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_refused(tmp_path, source, FileNotFoundError, "model-00002.safetensors")


@pytest.mark.parametrize("window", [0, -2, 33, 1, True, 2.0, [32, 31]])
def test_windows(tmp_path, source, window):
    words = ("attention_window", str(window if not isinstance(window, list) else 31), "even")
    assert_refused(tmp_path, source, ValueError, *words, attention_window=window)


def test_window_list_of_the_wrong_length(tmp_path, source):
    words = ("attention_window", "3", "2 layers")
    assert_refused(tmp_path, source, ValueError, *words, attention_window=[32, 32, 32])


@pytest.mark.parametrize("max_positions", [0, -1, 4095, 131073])
def test_max_positions(tmp_path, source, max_positions):
    words = ("max_positions", str(max_positions), "4096 to 131072")
    assert_refused(tmp_path, source, ValueError, *words, max_positions=max_positions)


def test_reverse_takes_no_sizes_and_only_our_checkpoints(tmp_path, source):
    assert_refused(tmp_path, source, ValueError, "'longformer'", "adaptive_sparse", reverse=True)
    assert_refused(tmp_path, source, ValueError, "max_positions", reverse=True, max_positions=5000)
    convert_checkpoint(source, tmp_path / "ours")
    assert_refused(tmp_path, tmp_path / "ours", ValueError, "'adaptive_sparse'", "--reverse")


def test_existing_target_is_left_alone(tmp_path, source):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "thesis.txt").write_text("years of work")
    assert_refused(tmp_path, source, FileExistsError, "target", "--overwrite")
    assert_refused(tmp_path, source, FileExistsError, "no checkpoint folder", overwrite=True)
    assert (tmp_path / "target" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("x")
    assert_refused(tmp_path, source, FileExistsError, "file", target="file", overwrite=True)


def test_overwrite_replaces_a_checkpoint(tmp_path, source):
    convert_checkpoint(source, tmp_path / "target")
    (tmp_path / "target" / "old.txt").write_text("old")
    convert_checkpoint(source, tmp_path / "target", overwrite=True)
    assert not (tmp_path / "target" / "old.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


@pytest.mark.parametrize("target", [".", "..", "inside"])
def test_target_that_overlaps_the_source(tmp_path, source, target):
    with pytest.raises(ValueError, match="overlaps"):
        convert_checkpoint(source, source / target, overwrite=True)
    assert (source / "model.safetensors").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_verify_names_the_tensor_with_nan(tmp_path, source, value):
    tensors = load_file(source / "model.safetensors")
    name = "longformer.encoder.layer.1.output.dense.bias"
    tensors[name][3] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert_refused(tmp_path, source, ValueError, name, "NaN", verify=True)


def test_verify_refuses_other_logits(tmp_path, source, monkeypatch):
    monkeypatch.setattr(convert_module, "measure_agreement", lambda *_, **__: Agreement(0.5, 2.0))
    assert_refused(tmp_path, source, ValueError, "differ by 0.5", "2e-05", verify=True)


def test_full_disk_is_noticed_before_writing(tmp_path, source, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**6, 10**6 - 5, 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="bytes needed, 5 free") as caught:
        convert_checkpoint(source, tmp_path / "target")
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("step", ["save_file", "write_text"])
def test_full_disk_is_noticed_while_writing(tmp_path, source, monkeypatch, step):
    def no_room(*args, **kwargs):
        if step == "save_file":
            raise checkpoint_module.SafetensorError("I/O error: No space left (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    module = checkpoint_module if step == "save_file" else convert_module
    monkeypatch.setattr(module, "save_file" if step == "save_file" else "write_json", no_room)
    with pytest.raises(OSError, match="bytes needed"):
        convert_checkpoint(source, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_interrupt_leaves_nothing(tmp_path, source):
    def interrupt(stage, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "target", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def killed(source, target, code):
    """Run a conversion in a process that `code` has prepared to be killed."""
    code += f"""
import os
from adaptive_longformer.conversion.convert import convert_checkpoint
convert_checkpoint({str(source)!r}, {str(target)!r}, progress=progress, overwrite=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300)
    assert done.returncode == -9


def test_a_killed_process_leaves_a_folder_that_the_next_one_names(tmp_path, source):
    kill = "progress = lambda stage, done, total: done == total and os.kill(os.getpid(), 9)"
    killed(source, tmp_path / "target", kill)
    (left,) = [path for path in tmp_path.iterdir() if path != source]
    assert left.name.startswith(".target.converting-")
    report = convert_checkpoint(source, tmp_path / "target")
    assert any(f"{left} is left of a conversion" in note for note in report.notes)


def test_a_process_killed_between_two_renames_leaves_the_old_checkpoint_beside(tmp_path, source):
    convert_checkpoint(source, tmp_path / "target")
    (tmp_path / "target" / "mark").write_text("old")
    kill = """
import os
progress = lambda stage, done, total: None
rename = os.replace
def replace(one, other):
    os.kill(os.getpid(), 9) if ".converting-" in str(one) else rename(one, other)
os.replace = replace
"""
    killed(source, tmp_path / "target", kill)
    assert not (tmp_path / "target").exists()
    (old,) = tmp_path.glob("target.replaced-*")
    assert (old / "mark").read_text() == "old"
    report = convert_checkpoint(source, tmp_path / "target")
    assert any(f"{old} is left of a conversion" in note for note in report.notes)
    assert (old / "mark").exists()


def damaged(content, random):
    """Replace or leave out a value somewhere in a JSON object."""
    values = [None, True, -1, 3, 2**63, 10**30, 0.5, -1e308, float("nan"), "", "a", "\x1b[31m"]
    values += [[], [1], [None], [["a"]], {}, {"a": {"b": []}}, {"0": 1}]
    key = random.choice(list(content))
    if isinstance(content[key], dict) and content[key] and random.random() < 0.7:
        damaged(content[key], random)
    elif random.random() < 0.15:
        del content[key]
    else:
        content[key] = random.choice(values)


@pytest.mark.parametrize("seed", range(int(os.environ.get("ADAPTIVE_LONGFORMER_FUZZ", "100"))))
def test_a_damaged_file_converts_or_is_refused_in_one_line(tmp_path, seeds_source, seed):
    random = Random(seed)
    folder, reverse = random.choice(seeds_source)
    shutil.copytree(folder, tmp_path / "source")
    names = ["config.json", "config.json", "generation_config.json", "source_names.json"]
    name = random.choice([name for name in names if (folder / name).is_file()])
    content = json.loads((folder / name).read_text())
    damaged(content, random)
    (tmp_path / "source" / name).write_text(json.dumps(content))
    try:
        convert_checkpoint(tmp_path / "source", tmp_path / "target", reverse=reverse)
    except (OSError, ValueError) as error:
        assert "\n" not in str(error) and len(str(error)) < 3000
        assert not (tmp_path / "target").exists()


@pytest.fixture(scope="module")
def seeds_source(tmp_path_factory):
    """Small checkpoints of three families and what they become, and whether they go back."""
    root, found = tmp_path_factory.mktemp("seeds"), []
    for make, family, head in (
        (write_source, "longformer", "ForMaskedLM"),
        (write_source, "big_bird", "ForQuestionAnswering"),
        (write_seq2seq, "led", "ForConditionalGeneration"),
    ):
        source, target = root / family, root / f"our-{family}"
        make(source, family, head)
        convert_checkpoint(source, target)
        found += [(source, False), (target, True)]
    return found
