"""Taking over a checkpoint of another family, and giving it back."""

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adaptive_longformer.configuration.remote_code import write_remote_code
from adaptive_longformer.conversion.checkpoint import (
    Checkpoint,
    check_room,
    disk_full,
    save_tensors,
    write_json,
    write_weights,
)
from adaptive_longformer.conversion.companions import (
    adapt_tokenizer,
    companion_files,
    copy_companions,
    has_tokenizer,
    module_folders,
)
from adaptive_longformer.conversion.families import FAMILIES
from adaptive_longformer.conversion.from_adaptive_sparse import plan_reversal
from adaptive_longformer.conversion.hub import check_push, push
from adaptive_longformer.conversion.model_card import model_card
from adaptive_longformer.conversion.plan import EXTRA_FILE, NAMES_FILE, Plan
from adaptive_longformer.conversion.source import locate
from adaptive_longformer.conversion.staging import check_target, left_behind, staged_folder
from adaptive_longformer.conversion.target import SEQ2SEQ, TARGETS
from adaptive_longformer.conversion.to_adaptive_sparse import plan_conversion
from adaptive_longformer.conversion.verify import (
    TOLERANCE,
    check_finite,
    different_texts,
    measure_agreement,
)

Progress = Callable[[str, int, int], None]

# What configuration, model card and file headers may take beside weights and tokenizer.
_SMALL_FILES = 1_000_000


@dataclass
class ConversionReport:
    """What a conversion did.

    Attributes:
        source: the source as it was named.
        target: the folder that was written.
        source_model_type: the family on the other side, such as "longformer".
        architecture: the class that loads the result.
        num_parameters: how many numbers the weights are.
        size_bytes: how much room the folder takes.
        max_logit_difference: the largest difference found by `verify`; None if not asked for.
        address: where it is on the hub; None if it was not put there.
        notes: what the user should know, one sentence each.
    """

    source: str
    target: str
    source_model_type: str
    architecture: str
    num_parameters: int
    size_bytes: int
    max_logit_difference: float | None = None
    address: str | None = None
    notes: list[str] = field(default_factory=list)


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    max_positions: int | None = None,
    attention_window: int | list[int] | None = None,
    verify: bool = False,
    reverse: bool = False,
    drop_adaptive: bool = False,
    overwrite: bool = False,
    push_to: str | None = None,
    private: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a checkpoint of another family to ours, with equal logits, or back.

    The target is written to a temporary folder beside it and moved to its place at the end: after
    an error there is nothing at the target, or what was there before.

    Args:
        source: a checkpoint folder, or a model id on the hub.
        target: the folder to write.
        max_positions: how many tokens the result can read, at least what the source can and at most
            131072; the position table is extended by repeating it. None: as many as the source.
        attention_window: tokens each token sees around itself, both sides together, even; one
            number or one per layer. None: Longformer's own; for RoBERTa and BERT twice their
            longest input, which makes the logits equal. BigBird attends by blocks: not allowed.
        verify: run both models on random token ids and refuse a result whose logits differ by more
            than 1e-5 * max(1, max|logit|), or whose generated text differs.
        reverse: the source is one of our checkpoints and goes back to the family it came from.
        drop_adaptive: with reverse, leave out a selection of blocks that is in use; the logits
            then differ.
        overwrite: replace a checkpoint that is at the target, and a model on the hub.
        push_to: USER/NAME, under which the target is also put on the hub. The token, the user and
            the name are looked at before anything is written.
        private: with push_to, nobody else sees a model that is new on the hub.
        progress: called with what is being done, how much of it is done, and how much there is.

    Returns:
        What was done, with notes on everything that is not simply equal.

    Raises:
        FileNotFoundError: no such source.
        FileExistsError: something is at the target, or a model of that name is on the hub.
        ValueError: an argument is not allowed, the source is of another family or damaged, or the
            logits differ.
        OSError: the disk is full or not writable, or the hub refuses.
    """
    _check_arguments(max_positions, attention_window, reverse, drop_adaptive)
    folder = locate(source, TARGETS if reverse else FAMILIES)
    target_folder = check_target(target, folder, overwrite)
    check_push(push_to, private, overwrite)
    if reverse:
        plan = plan_reversal(folder, drop_adaptive)
    else:
        plan = plan_conversion(folder, max_positions, attention_window)
    if verify:
        check_finite(Checkpoint(folder))
    progress = progress or (lambda stage, done, total: None)
    plan.notes += left_behind(target_folder)
    with staged_folder(target_folder) as staging:
        _write(plan, folder, staging, progress)
        difference = _verify(plan, folder, staging, reverse, progress) if verify else None
        if not reverse:
            name = push_to or target_folder.name
            card = model_card(plan, name, str(source), folder, difference)
            (staging / "README.md").write_text(card, encoding="utf-8")
        size = sum(file.stat().st_size for file in staging.rglob("*") if file.is_file())
    address = None if push_to is None else push(target_folder, push_to, private)
    return ConversionReport(
        source=str(source),
        target=str(target_folder),
        source_model_type=plan.source_model_type,
        architecture=plan.target_class.__name__,
        num_parameters=plan.num_parameters,
        size_bytes=size,
        max_logit_difference=difference,
        address=address,
        notes=plan.notes,
    )


def _check_arguments(
    max_positions: int | None,
    attention_window: int | list[int] | None,
    reverse: bool,
    drop_adaptive: bool,
) -> None:
    if reverse and (max_positions is not None or attention_window is not None):
        name = "max_positions" if max_positions is not None else "attention_window"
        raise ValueError(f"{name}: not allowed together with reverse")
    if drop_adaptive and not reverse:
        raise ValueError("drop_adaptive: allowed only together with reverse")
    if isinstance(max_positions, bool) or not isinstance(max_positions, int | None):
        raise ValueError(f"max_positions: {max_positions!r} is not allowed; give a whole number")


def _write(plan: Plan, folder: Path, staging: Path, progress: Progress) -> None:
    """Write everything but the model card; raise OSError if the disk has no room for it."""
    companions = companion_files(folder)
    if not has_tokenizer(folder):
        plan.notes.append(
            "the source has no tokenizer, so that the target has none either: "
            "tokenizer.save_pretrained puts one there"
        )
    if modules := module_folders(folder):
        plan.notes.append(
            f"kept for sentence-transformers: {', '.join(modules)}; import adaptive_longformer "
            "before SentenceTransformer loads the target"
        )
    needed = plan.num_bytes + sum(file.stat().st_size for file in companions) + _SMALL_FILES
    check_room(staging, needed)
    try:
        _write_files(plan, folder, staging, companions, progress)
    except OSError as error:
        if error.errno == errno.ENOSPC and "bytes needed" not in str(error):
            raise disk_full(staging, needed) from error
        raise


def _write_files(
    plan: Plan, folder: Path, staging: Path, companions: list[Path], progress: Progress
) -> None:
    write_weights(staging, plan.tensors, plan.load, progress)
    write_json(staging / "config.json", plan.config)
    copy_companions(folder, companions, staging)
    if plan.generation and not (staging / "generation_config.json").is_file():
        write_json(staging / "generation_config.json", plan.generation)
    if plan.model_max_length is not None and has_tokenizer(staging):
        plan.notes += adapt_tokenizer(
            staging, plan.model_max_length, plan.is_resized, plan.config.get("tokenizer_class")
        )
    if plan.config["model_type"] in TARGETS:
        write_remote_code(staging, plan.config["model_type"])
        write_json(staging / NAMES_FILE, plan.names or {})
        if plan.extra and plan.load_extra:
            save_tensors(
                staging / EXTRA_FILE,
                {name: plan.load_extra(name).contiguous() for name in plan.extra},
            )


def _verify(
    plan: Plan, folder: Path, staging: Path, reverse: bool, progress: Progress
) -> float | None:
    """Return the largest difference between the logits; raise ValueError if it is too large."""
    family = FAMILIES[plan.source_model_type]
    head = plan.head if plan.complete else "Model"
    if not plan.complete:
        plan.notes.append(
            "the head is not in the checkpoint: the encoder's output was verified instead"
        )
    source = _load(plan.source_class, folder, plan.complete)
    converted = _load(plan.target_class, staging, plan.complete)
    ours, theirs = (source, converted) if reverse else (converted, source)
    usable = min(ours.config.max_sequence_length, family.max_length(theirs.config))
    target_length = None
    if family.target is SEQ2SEQ:
        target_length = ours.config.max_decoder_position_embeddings
        if head == "ForSequenceClassification":
            usable = min(usable, target_length)  # the decoder reads the document too
    agreement = measure_agreement(
        source,
        converted,
        head=head,
        max_length=min(usable, plan.exact_length or usable),
        windows=_windows(ours.config),
        with_pooler=plan.complete,
        takes_global_attention_mask=family.takes_global_attention_mask,
        target_length=target_length,
        progress=progress,
    )
    if not agreement.relative <= TOLERANCE:
        raise ValueError(
            f"verify: the logits differ by {agreement.difference:.3g} at most, allowed is "
            f"{TOLERANCE * max(1.0, agreement.largest):.3g}; nothing was written"
        )
    if head == "ForConditionalGeneration" and (
        different := different_texts(
            source, converted, family.takes_global_attention_mask, min(usable, target_length or 0)
        )
    ):
        raise ValueError(f"verify: other {different}; nothing was written")
    return agreement.difference


def _windows(config: Any) -> list[int]:
    """Return after how many tokens each layer of our model stops seeing everything, about."""
    if config.attention_pattern == "big_bird":
        return [config.pattern(0).dense_length]
    windows = config.attention_window
    return windows if isinstance(windows, list) else [windows]


def _load(model_class: Any, folder: Path, with_head: bool) -> Any:
    model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    return model if with_head else model.base_model
