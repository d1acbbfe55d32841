r"""Go on with the pretraining of a masked language model on long documents, as RoBERTa at 8,192.

    python examples/train_masked_language_model.py --model FacebookAI/roberta-base \
        --data-file documents.jsonl --max-length 8192 --max-steps 3000
    accelerate launch examples/train_masked_language_model.py --model my-checkpoint --streaming \
        --data-file documents.jsonl --eval-file held_out.jsonl --max-steps 20000

A row of a data file (csv, json, jsonl or parquet) has a text, which is cut into pieces of
`--max-length` tokens. What is held out and the options are as in `finetune_classification.py`. A
RoBERTa or BERT is converted on the fly, to as many positions as `--max-length` asks for; its
repeated positions are what the first thousand steps are for. The result works in the pipeline
"fill-mask", and as `--model` of the other scripts.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    set_seed,
)

from adaptive_longformer.training.data_files import text_of
from adaptive_longformer.training.script_arguments import (
    DataArguments,
    RunArguments,
    option,
    parse_script_arguments,
)
from adaptive_longformer.training.script_data import load_splits
from adaptive_longformer.training.script_run import (
    one_line_for_mistakes,
    show_and_save,
    train_and_evaluate,
)
from adaptive_longformer.training.take_over import take_over_checkpoint


@dataclass
class Arguments(DataArguments):
    text_column: str = "text"
    mask_probability: float = option(0.15, help="share of the tokens to be guessed")

    def texts(self, place: str, row: dict[str, Any]) -> Iterator[dict[str, str]]:
        yield {"text": text_of(place, row, self.text_column)}


def parse_arguments(argv: list[str] | None = None) -> tuple[Arguments, RunArguments]:
    return parse_script_arguments(
        Arguments, RunArguments, argv, "Train a masked language model on long documents.",
        output_dir="outputs/masked_language_model", train_sampling_strategy="group_by_length",
        prediction_loss_only=True,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, float]:
    data, args = parse_arguments(argv)

    # Data
    with one_line_for_mistakes():
        splits = load_splits(data, data.texts, group=lambda row: row["text"])
        converted = Path(args.output_dir) / "converted"
        model_path = take_over_checkpoint(data.model, converted, data.max_length)
    tokenizer = AutoTokenizer.from_pretrained(model_path)

    # Model
    set_seed(args.seed)
    model = AutoModelForMaskedLM.from_pretrained(model_path, **data.model_options)
    # Saved with the model: the next script reads what is read here.
    tokenizer.model_max_length = min(data.max_length, model.config.max_sequence_length)

    def pieces(rows: list | IterableDataset) -> Dataset | IterableDataset:
        rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
        return rows.map(
            lambda batch: {
                "input_ids": tokenizer(
                    batch["text"], truncation=True, return_overflowing_tokens=True
                )["input_ids"]
            },
            batched=True,
            remove_columns="text",
        )

    # Trainer
    with one_line_for_mistakes():
        trainer = Trainer(
            model=model,
            args=args,
            data_collator=DataCollatorForLanguageModeling(
                tokenizer, mlm_probability=data.mask_probability, seed=args.seed
            ),
            train_dataset=pieces(splits.train),
            eval_dataset=pieces(splits.eval),
            processing_class=tokenizer,
        )
    metrics = train_and_evaluate(trainer)
    if splits.test:
        found = trainer.evaluate(pieces(splits.test), metric_key_prefix="test")
        found["test_perplexity"] = math.exp(found["test_loss"])
        show_and_save(trainer, "test", found)
        metrics |= found
    return metrics


if __name__ == "__main__":
    main()
