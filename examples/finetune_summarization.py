r"""Fine-tune an encoder-decoder to summarise long documents.

    python examples/finetune_summarization.py --model allenai/led-base-16384 \
        --dataset ccdv/arxiv-summarization --document-column article --target-column abstract
    python examples/finetune_summarization.py --model my-led \
        --data-file train.jsonl --eval-file validation.jsonl --test-file test.jsonl

A row of a data file (csv, json, jsonl or parquet) has a "document" and a "summary" (or other names,
see the options), and possibly a "query" that says what to summarise; "queries" of {"query",
"answer"} are read too. What is held out, `predictions.jsonl` and the options are as in
`finetune_classification.py`. An LED or BigBird-Pegasus is converted on the fly.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Seq2SeqTrainer, set_seed

from adaptive_longformer.inference.summarization import DEFAULTS
from adaptive_longformer.training.document_pairs import DocumentPair, pairs_of_row
from adaptive_longformer.training.script_arguments import (
    DataArguments,
    Seq2SeqRunArguments,
    option,
    parse_script_arguments,
)
from adaptive_longformer.training.script_data import load_splits
from adaptive_longformer.training.script_run import (
    one_line_for_mistakes,
    train_and_evaluate,
    write_predictions,
)
from adaptive_longformer.training.take_over import take_over_checkpoint
from adaptive_longformer.training.text_metrics import RougeMetric, TextsMetric
from adaptive_longformer.training.text_to_text_collator import TextToTextCollator


@dataclass
class Arguments(DataArguments):
    max_length: int = option(16384, help="tokens read per document")
    max_target_length: int = 512
    document_column: str = "document"
    target_column: str = "summary"
    max_train: int | None = option(None, help="documents to train on, the first ones")
    max_eval: int | None = option(None, help="documents to evaluate on, the first ones")
    num_beams: int = 4

    def pairs(self, place: str, row: dict[str, Any]) -> Iterator[DocumentPair]:
        return pairs_of_row(place, row, self.document_column, self.target_column)


def parse_arguments(argv: list[str] | None = None) -> tuple[Arguments, Seq2SeqRunArguments]:
    return parse_script_arguments(
        Arguments, Seq2SeqRunArguments, argv, "Fine-tune a long-document summariser.",
        output_dir="outputs/summarization",
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
        predict_with_generate=True, remove_unused_columns=False,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, float]:
    data, args = parse_arguments(argv)

    # Data
    with one_line_for_mistakes():
        splits = load_splits(data, data.pairs, group=lambda pair: pair["document"])
        converted = Path(args.output_dir) / "converted"
        model_path = take_over_checkpoint(data.model, converted, data.max_length)
    train = splits.train if data.streaming else splits.train[: data.max_train]
    held_out = splits.eval[: data.max_eval]
    tokenizer = AutoTokenizer.from_pretrained(model_path)

    # Model
    set_seed(args.seed)
    known = held_out if data.streaming else [*train, *held_out]
    has_queries = all(pair["query"] for pair in known)
    model = AutoModelForSeq2SeqLM.from_pretrained(
        model_path,
        default_global_tokens="question" if has_queries else "first",
        **data.model_options,
    )
    # Saved with the model: `adaptive-longformer summarize` writes as it is evaluated here.
    settings = {**DEFAULTS, "num_beams": data.num_beams, "max_length": data.max_target_length}
    if data.num_beams == 1:
        del settings["length_penalty"]  # it compares the ends of beams
    model.generation_config.update(**settings)
    collator = TextToTextCollator(
        tokenizer,
        max_length=min(data.max_length, model.config.max_sequence_length),
        max_target_length=data.max_target_length,
    )
    print(f"{collator.coverage(held_out):.1%} of the documents' tokens are read", flush=True)

    # Trainer
    metric = RougeMetric()
    with one_line_for_mistakes():
        trainer = Seq2SeqTrainer(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            compute_metrics=TextsMetric(metric, tokenizer, held_out),
        )
    metrics = train_and_evaluate(trainer)
    if splits.test:
        trainer.compute_metrics = in_test = TextsMetric(metric, tokenizer, splits.test)
        found = trainer.predict(splits.test)
        rows = (
            {"query": pair["query"], "text": text, "targets": pair["targets"]}
            for pair, text in zip(splits.test, in_test.texts(found.predictions), strict=True)
        )
        metrics |= write_predictions(trainer, found.metrics, rows)
    return metrics


if __name__ == "__main__":
    main()
