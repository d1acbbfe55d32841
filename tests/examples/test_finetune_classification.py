import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    LEDConfig,
    LEDForConditionalGeneration,
    LongformerConfig,
    LongformerForMaskedLM,
    TrainerCallback,
    pipeline,
)

from adaptive_longformer.testing import randomize_all_parameters
from adaptive_longformer.training.labelled_documents import (
    load_labelled_documents,
    stratified_split,
)
from adaptive_longformer.training.small_longformer import (
    train_byte_level_tokenizer,
    write_small_longformer,
)

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "examples" / "finetune_classification.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A Longformer that reads 128 tokens, and twenty documents."""
    folder = tmp_path_factory.mktemp("files")
    texts = [f"document {i} " + ("apple " if i % 2 else "pear ") * (60 + i) for i in range(20)]
    tokenizer = train_byte_level_tokenizer(texts, vocab_size=300, max_length=128)
    write_small_longformer(folder / "longformer", tokenizer, ["x", "y", "z"], max_length=128)
    rows = [json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(texts)]
    (folder / "data.jsonl").write_text("\n".join(rows))
    return folder


def arguments(files, output, *more):
    where = ["--model", str(files / "longformer"), "--data-file", str(files / "data.jsonl")]
    size = ["--max-length", "128", "--batch-size", "4", "--cpu"]
    return [*where, *size, "--output", str(output), *more]


def test_a_longformer_is_converted_and_fine_tuned(tmp_path, files, example, capsys):
    result = example["main"](arguments(files, tmp_path, "--epochs", "1"))
    assert result["test_size"] == 4
    assert set(result) == {"accuracy", "balanced_accuracy", "macro_f1", "test_size"}
    printed = capsys.readouterr().out
    assert f"converted to {tmp_path / 'converted'}" in printed
    assert "balanced_accuracy: " in printed and "test_size: 4" in printed
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert (tmp_path / "model.safetensors").is_file()


@pytest.fixture(scope="module", params=["longformer", "led"])
def base_checkpoint(request, files, tmp_path_factory):
    """A checkpoint as published, with a language model's head."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = AutoTokenizer.from_pretrained(files / "longformer")
    special = dict(pad_token_id=1, bos_token_id=0, sep_token_id=2, eos_token_id=2)
    sizes = dict(vocab_size=len(tokenizer), attention_window=16, **special)
    if request.param == "longformer":
        config = LongformerConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=130, **sizes,
        )  # fmt: skip
        model = LongformerForMaskedLM(config)
    else:
        config = LEDConfig(
            d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
            max_encoder_position_embeddings=128, max_decoder_position_embeddings=128, **sizes,
        )  # fmt: skip
        model = LEDForConditionalGeneration(config)
    # Weights with which it matters what is read.
    randomize_all_parameters(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_pipeline_scores_as_the_training_does(base_checkpoint, tmp_path, files, example):
    """Whatever the training marks as global must be marked where the model is used."""
    seen = {}

    class RecordingTrainer(example["Trainer"]):
        def evaluate(self, *args, **kwargs):
            found = self.predict(self.eval_dataset).predictions  # in another order
            seen["logits"] = found[0] if isinstance(found, tuple) else found
            return super().evaluate(*args, **kwargs)

    namespace = example["main"].__globals__
    settings = arguments(files, tmp_path, "--epochs", "2", "--model", str(base_checkpoint))
    settings += ["--learning-rate", "1e-2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(namespace, "Trainer", RecordingTrainer)
        result = example["main"](settings)

    data = stratified_split(load_labelled_documents(files / "data.jsonl"))["test"]
    classify = pipeline("text-classification", model=str(tmp_path), device="cpu")
    found = classify(data["text"][:], truncation=True, top_k=None)
    scores = [{entry["label"]: entry["score"] for entry in row}["1"] for row in found]
    expected = torch.tensor(seen["logits"]).softmax(dim=-1)[:, 1].tolist()
    assert sorted(scores) == pytest.approx(sorted(expected), abs=1e-5)
    assert max(scores) - min(scores) > 1e-3
    right = [(score > 0.5) == label for score, label in zip(scores, data["label"][:])]
    assert sum(right) / len(right) == result["accuracy"]


def test_resumed_training_ends_in_the_same_weights(tmp_path, files, example, capsys):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    example["main"](arguments(files, whole, "--epochs", "2", "--seed", "3"))

    class StoppedError(Exception):
        pass

    def interrupt_after_first_epoch(self, args, state, control, **kwargs):
        if state.epoch >= 1:
            raise StoppedError

    callback = type("Stop", (TrainerCallback,), {"on_save": interrupt_after_first_epoch})
    trainer_class = example["Trainer"]

    class InterruptedTrainer(trainer_class):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, callbacks=[callback()])

    settings = arguments(files, halves, "--epochs", "2", "--seed", "3")
    namespace = example["main"].__globals__
    namespace["Trainer"] = InterruptedTrainer
    try:
        with pytest.raises(StoppedError):
            example["main"](settings)
    finally:
        namespace["Trainer"] = trainer_class
    assert list(halves.glob("checkpoint-*")) and not (halves / "model.safetensors").exists()
    (halves / "checkpoint-999").mkdir()  # as a process leaves it that is ended while it writes
    (halves / "checkpoint-999" / "model.safetensors").write_bytes(b"half")
    example["main"]([*settings, "--resume"])
    assert f"{halves / 'checkpoint-999'} is incomplete" in capsys.readouterr().out

    expected, actual = (load_file(folder / "model.safetensors") for folder in (whole, halves))
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "steps"),
    [
        # accelerate 1.15 starts one process for this, and would start two through mpirun.
        (["accelerate.commands.launch", "--cpu", "--num_processes", "2"], {4, 8}),
        (["torch.distributed.run", "--standalone", "--nproc_per_node", "2"], {4}),
    ],
    ids=["accelerate", "torchrun"],
)
def test_two_processes_fine_tune_together(tmp_path, files, launcher, steps):
    command = [sys.executable, "-m", *launcher, str(SCRIPT)]
    command += arguments(files, tmp_path, "--epochs", "2", "--gradient-checkpointing")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    finished = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.count("test_size: 4") == 1
    assert finished.stdout.count("converted to") == 1
    assert json.loads((tmp_path / "result.json").read_text())["test_size"] == 4
    # 16 documents, 4 on each process at a time, twice.
    state = json.loads(next(tmp_path.glob("checkpoint-*/trainer_state.json")).read_text())
    assert state["global_step"] in steps
