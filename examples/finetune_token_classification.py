r"""Fine-tune a model that names the words of long documents, as persons, places and dates.

    python examples/finetune_token_classification.py --model allenai/longformer-base-4096 \
        --data-file documents.jsonl --epochs 5
    accelerate launch examples/finetune_token_classification.py --model my-checkpoint \
        --data-file train.jsonl --eval-file validation.jsonl --test-file test.jsonl

A row of a data file (json, jsonl or parquet) has a list of words and a list of as many tags. What
is held out and the options are as in `finetune_classification.py`; `predictions.jsonl` has the tags
of the words that are read. Words are joined by spaces, and the first token of each is trained on:
the pipeline "token-classification" reads a text in the same way.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    set_seed,
)

from adaptive_longformer.training.metrics import classification_metrics
from adaptive_longformer.training.script_arguments import (
    DataArguments,
    RunArguments,
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


@dataclass
class Arguments(DataArguments):
    words_column: str = "tokens"
    tags_column: str = "tags"

    def documents(self, place: str, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        words, tags = row.get(self.words_column), row.get(self.tags_column)
        if not isinstance(words, list) or not words or not all(map(str.strip, map(str, words))):
            raise ValueError(f"{place} has no list of words in {self.words_column!r}")
        if not isinstance(tags, list) or len(tags) != len(words):
            raise ValueError(f"{place} has {len(words)} words, {self.tags_column!r} as many tags?")
        yield {"row": place, "words": [*map(str, words)], "tags": [*map(str, tags)]}


def parse_arguments(argv: list[str] | None = None) -> tuple[Arguments, RunArguments]:
    return parse_script_arguments(
        Arguments, RunArguments, argv, "Fine-tune a model that names the words of documents.",
        output_dir="outputs/token_classification", train_sampling_strategy="group_by_length",
    )  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, float]:
    data, args = parse_arguments(argv)

    # Data
    with one_line_for_mistakes():
        splits = load_splits(data, data.documents, group=lambda row: tuple(row["words"]))
        splits, names = with_classes(data, splits, lambda row: row["tags"])
        converted = Path(args.output_dir) / "converted"
        model_path = take_over_checkpoint(data.model, converted, data.max_length)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    number = {name: index for index, name in enumerate(names)}

    # Model
    set_seed(args.seed)
    model = AutoModelForTokenClassification.from_pretrained(
        model_path,
        id2label=dict(enumerate(names)),
        label2id=number,
        ignore_mismatched_sizes=True,
        **data.model_options,
    )
    # Saved with the model: a pipeline reads what is read here.
    tokenizer.model_max_length = min(data.max_length, model.config.max_sequence_length)

    def encode(batch: dict[str, list]) -> dict[str, Any]:
        encoded = tokenizer([" ".join(words) for words in batch["words"]], truncation=True)
        labels = [[-100] * len(ids) for ids in encoded["input_ids"]]
        for i, (words, tags) in enumerate(zip(batch["words"], batch["tags"], strict=True)):
            starts = accumulate((len(word) + 1 for word in words[:-1]), initial=0)
            for start, tag in zip(starts, tags, strict=True):
                token = encoded.char_to_token(i, start)
                if token is not None:  # it is not cut off
                    labels[i][token] = number[tag]
        return {**encoded, "labels": labels}

    def encoded(rows: list | IterableDataset) -> Dataset | IterableDataset:
        rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
        return rows.map(encode, batched=True, remove_columns=["row", "words", "tags"])

    # Trainer
    with one_line_for_mistakes():
        trainer = Trainer(
            model=model,
            args=args,
            data_collator=DataCollatorForTokenClassification(tokenizer),
            train_dataset=encoded(splits.train),
            eval_dataset=encoded(splits.eval),
            processing_class=tokenizer,
            compute_metrics=classification_metrics,
        )
    metrics = train_and_evaluate(trainer)
    if splits.test:
        found = in_file_order(trainer).predict(encoded(splits.test))
        tagged = zip(splits.test, found.predictions.argmax(-1), found.label_ids, strict=True)
        rows = (
            {"row": row["row"], "tags": [names[i] for i in best[labels != -100]]}
            for row, best, labels in tagged
        )
        metrics |= write_predictions(trainer, found.metrics, rows)
    return metrics


if __name__ == "__main__":
    main()
