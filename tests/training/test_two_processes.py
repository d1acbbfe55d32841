"""Two processes train as one does: replicated (DDP) and sharded (FSDP2), saved, resumed.

On a CPU accelerate does not start FSDP; here its own functions for it shard the model, with the
settings of `examples/accelerate/fsdp2.yaml`.
"""

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from adaptive_longformer.modeling.modeling_adaptive_sparse import (
    AdaptiveSparseForMaskedLM,
    AdaptiveSparseForSequenceClassification,
)
from adaptive_longformer.modeling.modeling_adaptive_sparse_causal import AdaptiveSparseForCausalLM
from adaptive_longformer.modeling.modeling_adaptive_sparse_seq2seq import (
    AdaptiveSparseForConditionalGeneration,
)
from adaptive_longformer.testing import (
    run_two_processes,
    tiny_adaptive_model,
    tiny_seq2seq_model,
)
from adaptive_longformer.training.selection_ramp import SelectionRampCallback

SETTINGS = Path(__file__).resolve().parents[2] / "examples" / "accelerate"
STEPS, ACCUMULATION = 3, 2


def launched(name):
    """What `accelerate launch --config_file` makes of a file."""
    arguments = ["--config_file", str(SETTINGS / f"{name}.yaml"), "script.py"]
    return _validate_launch_command(launch_command_parser().parse_args(arguments))[0]


def adapted(base):
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(task_type="SEQ_CLS", modules_to_save=["adaptive", "classifier"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(base, settings)


def classifier(**fields):
    return tiny_adaptive_model(AdaptiveSparseForSequenceClassification, **fields).train()


MODELS = {
    "density": lambda: classifier(target_density=0.5),
    "LoRA": lambda: adapted(classifier(num_learned_global_blocks=1)),
    "tied weights": lambda: tiny_adaptive_model(AdaptiveSparseForMaskedLM).train(),
    "causal": lambda: tiny_adaptive_model(AdaptiveSparseForCausalLM).train(),
    # Of three modules that share a table accelerate 1.15 makes two groups, which torch refuses.
    "encoder-decoder, not sharded": lambda: tiny_seq2seq_model(
        AdaptiveSparseForConditionalGeneration, attention_pattern="adaptive", block_size=16,
        query_block_size=16, num_selected_blocks=4, selection_strength=1.0, dropout=0.0,
    ).train(),
}  # fmt: skip
LAYERS = {"causal": "AdaptiveSparseCausalLayer"}  # others than in the file


def replicated(model, name):
    return DistributedDataParallel(model)


def sharded(model, name=""):
    """The model as accelerate shards it, its layers' activations computed again."""
    os.environ.update(prepare_multi_gpu_env(launched("fsdp2")))
    if name in LAYERS:
        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = LAYERS[name]
    plugin = FullyShardedDataParallelPlugin()
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=False
    )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.gradient_checkpointing_enable()
    plugin.set_auto_wrap_policy(model)
    model = fsdp2_prepare_model(accelerator, model)
    layers = [m for m in model.modules() if type(m).__name__.endswith("Layer")]
    assert len(layers) == 2 and all(isinstance(layer, FSDPModule) for layer in layers)
    return model


def batch_of(model, step, rank):
    """What a process trains on; rank None: both of them."""
    generator = torch.Generator().manual_seed(step)
    input_ids = torch.randint(5, 90, (4, 100), generator=generator)
    kind = type(getattr(model, "module", model)).__name__
    if "Causal" in kind or "MaskedLM" in kind:
        labels = input_ids
    elif "Conditional" in kind:
        labels = input_ids[:, :11]
    else:
        labels = input_ids[:, 0] % 2
    rows = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    return {"input_ids": input_ids[rows], "labels": labels[rows]}


def train(model, rank, steps=range(STEPS), optimizer=None):
    """The losses, the gradients of the last step, and the optimiser."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    ramp, losses, grads = SelectionRampCallback(1.0), [], {}
    for step in steps:
        state = SimpleNamespace(max_steps=STEPS, global_step=step)
        ramp.on_step_begin(None, state, None, model=model)  # type: ignore[arg-type]
        for part in range(ACCUMULATION):
            loss = model(**batch_of(model, step * ACCUMULATION + part, rank)).loss / ACCUMULATION
            loss.backward()
            losses.append(loss.detach())
        grads = {
            plain(name): whole(parameter.grad)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses), grads, optimizer


def plain(name):
    return name.replace("module.", "")


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def weights_of(model):
    return {plain(name): whole(tensor) for name, tensor in model.state_dict().items()}


def saved_state(model, optimizer):
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))


def ways(name):
    return (replicated,) if "not sharded" in name else (replicated, sharded)


def _train(rank, folder):
    found = {
        (name, way.__name__): train(way(make(), name), rank)[:2]
        for name, make in MODELS.items()
        for way in ways(name)
    }
    torch.save((found, *_resume(rank, folder)), folder / f"{rank}.pt")


def _resume(rank, folder):
    """Two steps, saved in shards; a third one; and the third one in a new model that loads them.

    Then a save for which there is no room, and what a sharded model predicts.
    """
    model = sharded(classifier())
    *_, optimizer = train(model, rank, range(2))
    checkpoint.save(saved_state(model, optimizer), checkpoint_id=folder / "whole")
    losses = train(model, rank, range(2, 3), optimizer)[0]
    weights = weights_of(model)

    resumed = sharded(classifier())
    optimizer = torch.optim.SGD(resumed.parameters(), 0.5, momentum=0.9)
    state = saved_state(resumed, optimizer)
    checkpoint.load(state, checkpoint_id=folder / "whole")
    set_state_dict(
        resumed, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    resumed_losses = train(resumed, rank, range(2, 3), optimizer)[0]
    assert torch.equal(resumed_losses, losses)
    again = weights_of(resumed)
    for name, tensor in weights.items():
        assert torch.equal(again[name], tensor), name

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        checkpoint.save(state, checkpoint_id=folder / "half")
        said = ""
    except checkpoint.CheckpointException as error:
        said = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with torch.no_grad():
        logits = resumed.eval()(batch_of(resumed, 9, rank)["input_ids"]).logits
    return said, logits, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the two processes leave."""
    if sys.platform != "linux":
        pytest.skip("starts processes that talk over gloo")
    folder = tmp_path_factory.mktemp("two")
    run_two_processes(_train, folder)
    return folder


@pytest.mark.slow
def test_two_processes_train_as_one_does(folder):
    first, second = (torch.load(folder / f"{rank}.pt")[0] for rank in range(2))
    for name, make in MODELS.items():
        losses, grads, _ = train(make(), None)
        for way in (way.__name__ for way in ways(name)):
            found, found_grads = first[name, way]
            torch.testing.assert_close(
                (found + second[name, way][0]) / 2, losses, msg=f"{name}, {way}"
            )
            assert found_grads.keys() == grads.keys(), (name, way)
            for key, value in grads.items():
                torch.testing.assert_close(
                    found_grads[key], value, rtol=1e-3, atol=1e-6, msg=f"{name}, {way}: {key}"
                )


@pytest.mark.slow
def test_a_sharded_training_resumes_exactly_and_is_read_by_one_process(folder):
    (_, said, logits, weights), (_, _, more, _) = (torch.load(folder / f"{r}.pt") for r in range(2))
    model = classifier()
    model.load_state_dict(weights)
    with torch.no_grad():
        expected = model.eval()(batch_of(model, 9, None)["input_ids"]).logits
    torch.testing.assert_close(torch.cat([logits, more]), expected)

    # One process reads what two have written.
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    state = saved_state(model, optimizer)
    checkpoint.load(state, checkpoint_id=folder / "whole", no_dist=True)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    train(model.train(), None, range(2, 3), optimizer)
    for name, tensor in weights.items():
        torch.testing.assert_close(model.state_dict()[name], tensor, msg=name)

    # A save that ends early is an error on both sides: when it is written and when it is read.
    assert "CheckpointException" in said, said
    with pytest.raises(checkpoint.CheckpointException, match=r"\.metadata"):
        checkpoint.load(state, checkpoint_id=folder / "half", no_dist=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ddp", {"multi_gpu": True}),
        (
            "fsdp2",
            {"use_fsdp": True, "fsdp_version": 2, "fsdp_state_dict_type": "SHARDED_STATE_DICT"},
        ),
        ("deepspeed_zero2", {"use_deepspeed": True, "zero_stage": 2}),
        ("deepspeed_zero3", {"use_deepspeed": True, "zero_stage": 3}),
    ],
)
def test_accelerate_understands_our_files(name, expected):
    found = vars(launched(name))
    assert {key: found[key] for key in expected} == expected
    assert (found["num_processes"], found["mixed_precision"]) == (4, "bf16")


@pytest.mark.parametrize("where", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_why_accelerate_does_not_checkpoint_activations(where, monkeypatch):
    """A layer that is computed again needs the same dropout, which accelerate does not keep."""

    def gradient(checkpointing):
        model = classifier(**{where: 0.1})
        if checkpointing == "ours":
            model.gradient_checkpointing_enable()
        elif checkpointing == "accelerate's":
            for name, value in prepare_multi_gpu_env(launched("fsdp2")).items():
                monkeypatch.setenv(name, value)
            plugin = FullyShardedDataParallelPlugin()
            plugin.set_auto_wrap_policy(model)
            fsdp2_apply_ac(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), model)
        torch.manual_seed(0)
        model(**batch_of(model, 0, None)).loss.backward()
        return model.model.embeddings.word_embeddings.weight.grad

    expected = gradient(None)
    assert torch.equal(gradient("ours"), expected)
    assert (gradient("accelerate's") - expected).norm() > 0.05 * expected.norm()


def test_there_are_no_other_files():
    assert len(list(SETTINGS.glob("*.yaml"))) == 4


def test_slurm_starts_a_launcher_on_every_machine(tmp_path):
    """With commands of our own in place of SLURM's and of accelerate, which say what they get.
    So many names fill a pipe: a reader that stops at the first would end the writer, and the job.
    """
    commands = {
        "scontrol": "echo first; seq 100000",
        "srun": 'for id in 0 1; do SLURM_NODEID=$id "$@"; done',
        "accelerate": 'printf "%s " "$@"; echo',
        "adaptive-longformer": ":",
    }
    for name, command in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{command}\n")
        (tmp_path / name).chmod(0o755)
    lines = subprocess.run(
        ["bash", SETTINGS / "slurm.sh", "script.py", "--model", "a b"],
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "CONFIG": "fsdp2",
            "SLURM_JOB_NODELIST": "x", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4",
        },
        capture_output=True, text=True, check=True, cwd=SETTINGS.parents[1],
    ).stdout.splitlines()  # fmt: skip
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        words = line.split()
        assert words.pop(0) == "launch" and line.endswith("script.py --model a b ")
        args = _validate_launch_command(launch_command_parser().parse_args(words))[0]
        assert (args.num_machines, args.num_processes) == (2, 8) and args.use_fsdp
        assert (args.machine_rank, args.main_process_ip) == (rank, "first")
