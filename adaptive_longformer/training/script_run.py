"""What all scripts in `examples/` do with a Trainer: train, choose the best model, test, save."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import AdamW
from transformers import EarlyStoppingCallback, Trainer

from adaptive_longformer.modeling.adaptive_selection import selections
from adaptive_longformer.training.adaptive_optimizer import adaptive_parameter_groups
from adaptive_longformer.training.resume import is_complete, last_complete_checkpoint
from adaptive_longformer.training.selection_ramp import SelectionRampCallback


@contextmanager
def one_line_for_mistakes() -> Iterator[None]:
    """Inside, what is wrong with files ends the script with one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error


def train_and_evaluate(trainer: Trainer) -> dict[str, float]:
    """Trains, or goes on, evaluates the best model and saves it.

    A model that chooses what to read is led to it (`SelectionRampCallback`), and its gates, budgets
    and windows learn at a rate of their own where the Trainer allows it (not under FSDP and
    DeepSpeed).
    """
    args: Any = trainer.args
    if args.early_stopping is not None:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping))
    model: Any = trainer.model
    if parts := selections(model):
        # One that was trained already starts as it is.
        is_new = not parts[0].is_active
        ramp = SelectionRampCallback(**({} if is_new else {"ramp_ratio": 0.0}))
        with one_line_for_mistakes():
            ramp.add_to(trainer)
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            groups = adaptive_parameter_groups(
                model, args.learning_rate, weight_decay=args.weight_decay
            )
            trainer.optimizer = AdamW(groups)
    checkpoint = None
    if args.resume:
        with one_line_for_mistakes():
            checkpoint = last_complete_checkpoint(args.output_dir)
    with _unfinished_checkpoints_removed(Path(args.output_dir)):
        trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    trainer.save_model()
    show_and_save(trainer, "eval", metrics)
    return metrics


def write_predictions(
    trainer: Trainer, metrics: dict[str, float], rows: Iterable[dict[str, Any]]
) -> dict[str, float]:
    """Shows and saves the metrics of `Trainer.predict`, and writes `predictions.jsonl`.

    Args:
        trainer: that predicted.
        metrics: what it measured.
        rows: what to write about each test document, in the order of the test file.
    """
    show_and_save(trainer, "test", metrics)
    if trainer.is_world_process_zero():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (Path(str(trainer.args.output_dir)) / "predictions.jsonl").write_text(lines, "utf-8")
    return metrics


def in_file_order(trainer: Trainer) -> Trainer:
    """The same Trainer, which predicts in the order of the data set; by length it would not."""
    trainer.args.train_sampling_strategy = "random"
    return trainer


def show_and_save(trainer: Trainer, split: str, metrics: dict[str, float]) -> None:
    """Prints the metrics and writes them to `{split}_results.json` and `all_results.json`."""
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


@contextmanager
def _unfinished_checkpoints_removed(output: Path) -> Iterator[None]:
    """Inside, a checkpoint that cannot be written, as on a full disk, is removed with one line."""
    before = set(output.glob("checkpoint-*"))
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        unfinished = [
            path for path in set(output.glob("checkpoint-*")) - before if not is_complete(path)
        ]
        if not unfinished:
            raise
        if PartialState().is_main_process:
            for path in unfinished:
                shutil.rmtree(path, ignore_errors=True)
        reason = str(error).strip().rpartition("\n")[2]
        raise SystemExit(
            f"{unfinished[0]} could not be written and is removed: {reason}. What was written "
            "before is whole: make room and go on with --resume"
        ) from error
