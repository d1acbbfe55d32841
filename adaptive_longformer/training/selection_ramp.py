"""Lets a converted model start as its source and end with all it can choose."""

import math
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adaptive_longformer.modeling.adaptive_selection import selections, set_selection_strength


class SelectionRampCallback(TrainerCallback):
    """Raises the selection strength from 1 / steps to its final value at the start of a training.

    Before step s of the ramp's `steps` the strength is set to final_strength * s / steps, in the
    model and in its configuration. A resumed training goes on where it was.

    Beside every logged loss it logs `selection_strength`, `selection_density` (about the share of
    keys that is still read), `selection_keys` (what a query in the middle of a long document reads
    at most) and, with `config.target_density`, `task_loss`: the loss without the density's share.
    They are in `state.log_history` and in what is printed; with `add_to` trackers show them too.

    Args:
        ramp_ratio: share of the training over which the strength rises.
        final_strength: from above 0 to 1.

    Raises:
        ValueError: a number is out of range; or, when the training begins, the model's
            attention_pattern is not "adaptive", or the Trainer smooths labels although the
            configuration asks for a loss that only the model adds.
    """

    def __init__(self, ramp_ratio: float = 0.25, final_strength: float = 1.0) -> None:
        if not 0 <= ramp_ratio <= 1:
            raise ValueError(f"ramp_ratio is {ramp_ratio}, a number from 0 to 1 is needed")
        if not 0 < final_strength <= 1:
            raise ValueError(
                f"final_strength is {final_strength}, a number above 0 and up to 1 is needed"
            )
        self.ramp_ratio = ramp_ratio
        self.final_strength = final_strength
        self._last: float | None = None

    def add_to(self, trainer: Trainer) -> None:
        """Adds the callback before all others. Those of `Trainer(callbacks=...)` come after the
        trackers (TensorBoard and the like), which have then sent their values already.

        Raises:
            ValueError: the Trainer computes the loss itself, without what the model adds to it.
        """
        model: nn.Module = trainer.model  # type: ignore[assignment]
        if trainer.compute_loss_func is not None and selections(model)[0].config.target_density:
            raise ValueError(
                "compute_loss_func (or class weights) leaves out what the model adds to its loss: "
                "None is needed with config.target_density"
            )
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last = None
        self._check_label_smoothing(args, kwargs["model"])
        self.on_step_begin(args, state, control, **kwargs)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        steps = max(1, math.ceil(self.ramp_ratio * state.max_steps))
        strength = self.final_strength * min(1.0, (state.global_step + 1) / steps)
        if strength != self._last:
            set_selection_strength(model, strength)
            self._last = strength

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        parts = selections(kwargs["model"])
        density = sum(part.density().item() for part in parts) / len(parts)
        more = {
            "selection_strength": parts[0].strength.item(),
            "selection_density": density,
            "selection_keys": sum(part.most_keys() for part in parts) / len(parts),
        }
        if (share := parts[0].share_of_task()) is not None:
            more["task_loss"] = logs["loss"] * share
        logs.update(more)
        state.log_history[-1].update(more)  # a copy of the logs

    def _check_label_smoothing(self, args: TrainingArguments, model: nn.Module) -> None:
        parts = selections(model)
        if not args.label_smoothing_factor or not parts:
            return
        if value := parts[0].config.target_density:
            raise ValueError(
                f"label_smoothing_factor is {args.label_smoothing_factor}, 0 is needed with "
                f"config.target_density = {value}: the Trainer computes the loss itself then, "
                "without what the model adds"
            )
