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


def predictions(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def losses(folder):
    """What the last checkpoint has logged about the training."""
    state = json.loads(next(folder.glob("checkpoint-*/trainer_state.json")).read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def test_a_longformer_is_converted_and_fine_tuned(tmp_path, files, example, capsys):
    result = example["main"](arguments(files, tmp_path, "--epochs", "1"))
    printed = capsys.readouterr().out
    assert f"converted to {tmp_path / 'converted'}" in printed
    assert "eval_macro_f1" in printed and "test_balanced_accuracy" in printed
    saved = json.loads((tmp_path / "all_results.json").read_text())
    assert {name: result[name] for name in saved} == saved and "test_loss" in saved
    assert (tmp_path / "model.safetensors").is_file()
    # Of twenty documents a fifth is held out, two of each class, and nobody else sees them.
    rows = [int(row["row"].rpartition(" ")[2]) for row in predictions(tmp_path)]
    assert rows == sorted(rows) and [row % 2 for row in rows].count(0) == len(rows) / 2 == 2


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_other_problems_are_written_as_a_pipeline_says_them(kind, tmp_path, files, example):
    names = [["apple"] * (i % 2) + ["few"] * (i < 10) for i in range(20)]
    rows = [json.loads(line) for line in (files / "data.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row["label"] = i / 20 if kind == "regression" else names[i]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    settings = arguments(files, tmp_path / "out", "--epochs", "1", "--problem-type", kind)
    settings[settings.index("--data-file") + 1] = str(data)
    result = example["main"]([*settings, "--eval-file", str(data), "--test-file", str(data)])
    classify = pipeline("text-classification", model=str(tmp_path / "out"), device="cpu")
    found = classify([row["text"] for row in rows], truncation=True, top_k=None)
    written = predictions(tmp_path / "out")
    for scores, row in zip(found, written, strict=True):
        expected = row["scores"] if "scores" in row else {"value": row["value"]}
        actual = {entry["label"]: entry["score"] for entry in scores}
        assert actual == pytest.approx(expected, abs=1e-5)
    if kind == "regression":
        errors = [abs(row["value"] - i / 20) for i, row in enumerate(written)]
        assert result["test_mean_absolute_error"] == pytest.approx(sum(errors) / 20, abs=1e-5)
    else:
        right = [sorted(row["label"]) == sorted(names[i]) for i, row in enumerate(written)]
        assert result["test_exact_match"] == pytest.approx(sum(right) / 20)


def test_an_adaptive_model_learns_from_a_stream_and_every_log_says_what_it_reads(
    tmp_path, files, example
):
    settings = arguments(files, tmp_path, "--streaming", "--max-steps", "4", "--logging-steps", "1")
    settings += ["--eval-file", str(files / "data.jsonl"), "--attention-pattern", "adaptive"]
    example["main"](settings)
    logged = losses(tmp_path)
    assert [entry["selection_strength"] for entry in logged] == [1.0] * 4
    assert all(entry["selection_keys"] > entry["selection_density"] > 0 for entry in logged)
    assert json.loads((tmp_path / "config.json").read_text())["selection_strength"] == 1.0
    assert not (tmp_path / "predictions.jsonl").exists()  # nothing was left to test on


def test_training_ends_where_nothing_gets_better(tmp_path, files, example):
    settings = arguments(files, tmp_path, "--epochs", "9", "--learning-rate", "0")
    result = example["main"]([*settings, "--early-stopping", "1", "--class-weights"])
    assert result["epoch"] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
def test_a_full_disk_leaves_whole_checkpoints_and_one_line(tmp_path, files, example):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class FullDisk(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))

    class FullTrainer(example["Trainer"]):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, callbacks=[FullDisk()])

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(example["main"].__globals__, "Trainer", FullTrainer)
        try:
            with pytest.raises(SystemExit, match="checkpoint-8 could not be written") as said:
                example["main"](arguments(files, tmp_path, "--epochs", "2"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(said.value.code) and "--resume" in str(said.value.code)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--streaming"], "--streaming needs --max-steps"),
        (["--streaming", "--max-steps", "3"], "--streaming needs --eval-file"),
        (["--dataset", "imdb"], "one of --data-file and --dataset is needed"),
        (["--report-to", "a-notebook"], "a-notebook is not supported"),
        (["--class-weights", "--problem-type", "regression"], "--class-weights needs"),
        (["--gradient-acumulation", "3"], "unrecognized arguments"),
        (["--attention-pattern", "none"], "attention_pattern is 'none', allowed are"),
        (["--early-stopping", "3", "--eval-strategy", "steps"], "the save and eval strategy"),
    ],
)
def test_a_mistake_in_the_options_ends_with_one_line(words, message, files, example, capsys):
    with pytest.raises(SystemExit):
        example["main"](arguments(files, "never-written", *words))
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1] or message in said[1], said
    assert said[0].startswith("usage: ") and not Path("never-written").exists()


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
    settings = arguments(files, tmp_path, "--epochs", "2", "--model", str(base_checkpoint))
    settings += ["--learning-rate", "1e-2", "--test-file", str(files / "data.jsonl")]
    result = example["main"](settings)

    rows = [json.loads(line) for line in (files / "data.jsonl").read_text().splitlines()]
    classify = pipeline("text-classification", model=str(tmp_path), device="cpu")
    found = classify([row["text"] for row in rows], truncation=True, top_k=None)
    scores = [{entry["label"]: entry["score"] for entry in row}["1"] for row in found]
    written = [row["scores"]["1"] for row in predictions(tmp_path)]
    assert scores == pytest.approx(written, abs=1e-5)
    assert max(scores) - min(scores) > 1e-3
    right = [(score > 0.5) == row["label"] for score, row in zip(scores, rows)]
    assert sum(right) / len(right) == result["test_accuracy"]


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


def launched(launcher, *words):
    """What a script says that several processes run."""
    finished = subprocess.run(
        [sys.executable, "-m", *launcher, str(SCRIPT), *words],
        env={
            **os.environ,
            "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    return finished


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.slow
def test_two_processes_train_an_adaptive_model_as_one_does(tmp_path, files, example):
    """The same documents in every step, by two processes or by twice the accumulation."""
    more = ["--attention-pattern", "adaptive", "--train-sampling-strategy", "random"]
    more += ["--epochs", "1", "--gradient-checkpointing", "--logging-steps", "1"]
    for name in ("eval", "test"):
        more += [f"--{name}-file", str(files / "data.jsonl")]
    more += ["--batch-size", "1"]  # twenty documents make five steps
    one, two = tmp_path / "one", tmp_path / "two"
    example["main"](arguments(files, one, *more, "--gradient-accumulation", "4"))
    words = arguments(files, two, *more, "--gradient-accumulation", "2")
    finished = launched(TORCHRUN, *words)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.count("converted to") == finished.stdout.count("test metrics") == 1
    names = ("loss", "grad_norm", "selection_strength", "selection_keys")
    for alone, together in zip(losses(one), losses(two), strict=True):
        assert [together[n] for n in names] == pytest.approx([alone[n] for n in names], rel=1e-3)
    scores = [[row["scores"]["1"] for row in predictions(folder)] for folder in (one, two)]
    assert scores[1] == pytest.approx(scores[0], abs=1e-3) and len(scores[1]) == 20

    with pytest.raises(SystemExit, match="was written by 2 processes, these are 1"):
        example["main"]([*words, "--resume"])


@pytest.mark.slow
def test_accelerate_launches_the_script(tmp_path, files):
    # accelerate 1.15 starts one process for this, and would start two through mpirun.
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    finished = launched(launcher, *arguments(files, tmp_path, "--epochs", "1"))
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.count("test metrics") == 1
