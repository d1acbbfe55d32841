"""Where an interrupted training can go on."""

import json
from pathlib import Path

from accelerate import PartialState


def last_complete_checkpoint(output: str | Path) -> str | None:
    """The newest checkpoint of a Trainer's output folder that was written to its end.

    A line on the terminal names each newer one.

    Args:
        output: the `output_dir` of the training; it need not exist.

    Returns:
        What `Trainer.train(resume_from_checkpoint=...)` takes; None if there is no such checkpoint.
    """
    steps = [path.name.removeprefix("checkpoint-") for path in Path(output).glob("checkpoint-*")]
    for step in sorted(map(int, filter(str.isdecimal, steps)), reverse=True):
        folder = Path(output) / f"checkpoint-{step}"
        if _is_complete(folder):
            return str(folder)
        PartialState().print(f"{folder} is incomplete and is left out", flush=True)
    return None


def _is_complete(checkpoint: Path) -> bool:
    """Whether the state is there, which the Trainer writes last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_bytes())
    except (OSError, ValueError):
        return False
    return True
