"""Where an interrupted training can go on."""

import json
import os
from pathlib import Path

from accelerate import PartialState


def last_complete_checkpoint(output: str | Path) -> str | None:
    """The newest checkpoint of a Trainer's output folder that was written to its end.

    A line on the terminal names each newer one.

    Args:
        output: the `output_dir` of the training; it need not exist.

    Returns:
        What `Trainer.train(resume_from_checkpoint=...)` takes; None if there is no such checkpoint.

    Raises:
        ValueError: another number of processes wrote it, or it is sharded and this training is not.
    """
    steps = [path.name.removeprefix("checkpoint-") for path in Path(output).glob("checkpoint-*")]
    for step in sorted(map(int, filter(str.isdecimal, steps)), reverse=True):
        folder = Path(output) / f"checkpoint-{step}"
        if is_complete(folder):
            _check_processes(folder)
            return str(folder)
        PartialState().print(f"{folder} is incomplete and is left out", flush=True)
    return None


def is_complete(checkpoint: Path) -> bool:
    """Whether the state is there, which the Trainer writes last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_bytes())
    except (OSError, ValueError):
        return False
    return True


def _check_processes(checkpoint: Path) -> None:
    """The Trainer itself would go on with other documents, or with none of the weights."""
    processes, now = len(list(checkpoint.glob("rng_state*.pth"))), PartialState().num_processes
    if processes not in (0, now):
        raise ValueError(
            f"{checkpoint} was written by {processes} processes, these are {now}: start as many, "
            "or train anew in another --output-dir"
        )
    is_sharded = (checkpoint / "pytorch_model_fsdp_0").is_dir()
    shards = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if processes and is_sharded != shards:
        kinds = ["whole on every process", "sharded by FSDP"]
        raise ValueError(
            f"{checkpoint} is {kinds[is_sharded]}, this training is {kinds[shards]}: launch it "
            "with the same configuration of accelerate"
        )
