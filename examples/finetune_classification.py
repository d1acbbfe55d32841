r"""Fine-tune a long-document classifier with the Trainer.

    python examples/finetune_classification.py --model allenai/longformer-base-4096 \
        --data-file documents.jsonl --early-stopping 3
    python examples/finetune_classification.py --model my-checkpoint --streaming --max-steps 5000 \
        --data-file train.jsonl --eval-file validation.jsonl --test-file test.jsonl
    accelerate launch examples/finetune_classification.py --model my-checkpoint \
        --dataset ccdv/patent-classification

A row of a data file (csv, json, jsonl or parquet) has a text and a label: a name, a list of names
with `--problem-type multi_label_classification`, a number with `regression`. If there is no other
file, a fifth is held out to test on and a tenth of the rest to choose the best model by. What the
best model says about the test documents is written to `predictions.jsonl`.

All options of TrainingArguments are options here. A Longformer, RoBERTa or BERT is converted on the
fly, to as many positions as `--max-length` asks for. Which tokens are global is left to the model's
configuration, so that a pipeline on the result scores as the training does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, set_seed

from adaptive_longformer.training.class_weights import WeightedLoss
from adaptive_longformer.training.data_files import text_of
from adaptive_longformer.training.labelled_documents import read_label
from adaptive_longformer.training.metrics import METRICS
from adaptive_longformer.training.script_arguments import (
    DataArguments,
    RunArguments,
    option,
    parse_script_arguments,
)
from adaptive_longformer.training.script_data import load_splits, with_classes
from adaptive_longformer.training.script_run import (
    in_file_order,
    one_line_for_mistakes,
    train_and_evaluate,
    write_predictions,
)
from adaptive_longformer.training.take_over import take_over_checkpoint

SINGLE = "single_label_classification"


@dataclass
class Arguments(DataArguments):
    text_column: str = "text"
    label_column: str = "label"
    problem_type: Literal[
        "single_label_classification", "multi_label_classification", "regression"
    ] = SINGLE
    class_weights: bool = option(False, help="rare classes count as much as frequent ones")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.class_weights and self.problem_type != SINGLE:
            raise ValueError(f"--class-weights needs --problem-type {SINGLE}")

    def examples(self, place: str, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        text = text_of(place, row, self.text_column)
        label = read_label(place, row.get(self.label_column), self.problem_type)
        label = str(label) if self.problem_type == SINGLE else label
        yield {"row": place, "text": text, "label": label}

    def names_of(self, row: dict[str, Any]) -> list[str]:
        return [row["label"]] if self.problem_type == SINGLE else [*map(str, row["label"])]


def parse_arguments(argv: list[str] | None = None) -> tuple[Arguments, RunArguments]:
    return parse_script_arguments(
        Arguments, RunArguments, argv, "Fine-tune a long-document classifier.",
        output_dir="outputs/classification", train_sampling_strategy="group_by_length",
    )  # fmt: skip


def label_ids(labels: list, names: list[str], problem_type: str) -> list:
    """What the model's loss takes."""
    if problem_type == "regression":
        return labels
    if problem_type == SINGLE:
        return [names.index(label) for label in labels]
    return [[float(name in map(str, label)) for name in names] for label in labels]


def read_scores(logits: np.ndarray, names: list[str], problem_type: str) -> dict[str, Any]:
    """What the model says about a document, as a pipeline shows it."""
    if problem_type == "regression":
        return {"value": float(logits[0])}
    scores = torch.tensor(logits).float()
    scores = scores.softmax(-1) if problem_type == SINGLE else scores.sigmoid()
    named = dict(zip(names, scores.tolist(), strict=True))
    best = max(named, key=named.__getitem__)
    found = best if problem_type == SINGLE else [name for name in named if named[name] > 0.5]
    return {"label": found, "scores": named}


def main(argv: list[str] | None = None) -> dict[str, float]:
    data, args = parse_arguments(argv)
    kind = data.problem_type

    # Data
    with one_line_for_mistakes():
        splits = load_splits(
            data, data.examples, group=lambda row: row["text"], stratum=lambda row: row["label"]
        )
        known = [row["label"] for row in (splits.eval if data.streaming else splits.train)]
        names = []
        if kind != "regression":
            splits, names = with_classes(data, splits, data.names_of)
        loss = WeightedLoss(known, names) if data.class_weights else None
        converted = Path(args.output_dir) / "converted"
        model_path = take_over_checkpoint(data.model, converted, data.max_length)
    tokenizer = AutoTokenizer.from_pretrained(model_path)

    def encoded(rows: list | IterableDataset | None) -> Dataset | IterableDataset | None:
        rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
        return rows and rows.map(
            lambda batch: {
                **tokenizer(batch["text"], truncation=True),
                "label": label_ids(batch["label"], names, kind),
            },
            batched=True,
            remove_columns=["row", "text"],
        )

    # Model
    set_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_path,
        id2label=dict(enumerate(names or ["value"])),
        label2id={name: index for index, name in enumerate(names or ["value"])},
        problem_type=kind,
        ignore_mismatched_sizes=True,
        **data.model_options,
    )
    # Saved with the model: a pipeline with truncation=True reads what is read here.
    tokenizer.model_max_length = min(data.max_length, model.config.max_sequence_length)

    # Trainer
    with one_line_for_mistakes():
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=encoded(splits.train),
            eval_dataset=encoded(splits.eval),
            processing_class=tokenizer,
            compute_metrics=METRICS[kind],
            compute_loss_func=loss,
        )
    metrics = train_and_evaluate(trainer)
    if splits.test:
        found = in_file_order(trainer).predict(encoded(splits.test))
        logits = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
        rows = (
            {"row": example["row"], **read_scores(scores, names, kind)}
            for example, scores in zip(splits.test, logits, strict=True)
        )
        metrics |= write_predictions(trainer, found.metrics, rows)
    return metrics


if __name__ == "__main__":
    main()
