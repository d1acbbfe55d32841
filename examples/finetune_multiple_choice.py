r"""Fine-tune a model that chooses among answers to a question about a long document.

    python examples/finetune_multiple_choice.py --model allenai/longformer-base-4096 \
        --data-file questions.jsonl --batch-size 2 --gradient-accumulation 4
    accelerate launch examples/finetune_multiple_choice.py --model my-checkpoint \
        --data-file train.jsonl --eval-file validation.jsonl --test-file test.jsonl

A row of a data file (json, jsonl or parquet) has a "document", a "question", "choices", a list of
texts, as many in every row, and the "answer", the number of the right one from 0. What is held out
and the options are as in `finetune_classification.py`; `predictions.jsonl` has the chosen answers.
The document comes first and is cut; question and choice are what follows the separator, which a
Longformer reads as global tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import (
    AutoModelForMultipleChoice,
    AutoTokenizer,
    DataCollatorForMultipleChoice,
    Trainer,
    set_seed,
)

from adaptive_longformer.training.data_files import text_of
from adaptive_longformer.training.metrics import classification_metrics
from adaptive_longformer.training.script_arguments import (
    DataArguments,
    RunArguments,
    option,
    parse_script_arguments,
)
from adaptive_longformer.training.script_data import load_splits
from adaptive_longformer.training.script_run import (
    in_file_order,
    one_line_for_mistakes,
    train_and_evaluate,
    write_predictions,
)
from adaptive_longformer.training.take_over import take_over_checkpoint


@dataclass
class Arguments(DataArguments):
    num_choices: int = option(4, help="answers to choose from, in every row")

    def questions(self, place: str, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        document, question = (text_of(place, row, name) for name in ("document", "question"))
        choices, answer = row.get("choices"), row.get("answer")
        if not isinstance(choices, list) or len(choices) != self.num_choices:
            raise ValueError(f"{place}: a list of --num-choices = {self.num_choices} is needed")
        if answer not in range(self.num_choices):
            raise ValueError(f"{place} has the answer {answer!r}, 0 to {self.num_choices - 1} are")
        asked = [f"{question} {choice}" for choice in choices]
        yield {"row": place, "document": document, "asked": asked, "labels": answer}


def parse_arguments(argv: list[str] | None = None) -> tuple[Arguments, RunArguments]:
    return parse_script_arguments(
        Arguments, RunArguments, argv, "Fine-tune a model that chooses among answers.",
        output_dir="outputs/multiple_choice", per_device_train_batch_size=2,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, float]:
    data, args = parse_arguments(argv)

    # Data
    with one_line_for_mistakes():
        splits = load_splits(data, data.questions, group=lambda row: row["document"])
        converted = Path(args.output_dir) / "converted"
        model_path = take_over_checkpoint(data.model, converted, data.max_length)
    tokenizer = AutoTokenizer.from_pretrained(model_path)

    # Model
    set_seed(args.seed)
    model = AutoModelForMultipleChoice.from_pretrained(model_path, **data.model_options)
    # Saved with the model: whoever uses it reads what is read here.
    tokenizer.model_max_length = min(data.max_length, model.config.max_sequence_length)

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        documents = [row["document"]] * data.num_choices
        return {**tokenizer(documents, row["asked"], truncation="only_first")}

    def encoded(rows: list | IterableDataset) -> Dataset | IterableDataset:
        rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
        return rows.map(encode, remove_columns=["row", "document", "asked"])

    # Trainer
    with one_line_for_mistakes():
        trainer = Trainer(
            model=model,
            args=args,
            data_collator=DataCollatorForMultipleChoice(tokenizer),
            train_dataset=encoded(splits.train),
            eval_dataset=encoded(splits.eval),
            processing_class=tokenizer,
            compute_metrics=classification_metrics,
        )
    metrics = train_and_evaluate(trainer)
    if splits.test:
        found = in_file_order(trainer).predict(encoded(splits.test))
        rows = (
            {"row": row["row"], "answer": int(logits.argmax()), "scores": scores.tolist()}
            for row, logits, scores in zip(
                splits.test, found.predictions, torch.tensor(found.predictions).softmax(-1)
            )
        )
        metrics |= write_predictions(trainer, found.metrics, rows)
    return metrics


if __name__ == "__main__":
    main()
