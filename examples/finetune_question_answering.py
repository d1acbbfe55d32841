r"""Fine-tune an encoder-decoder to answer questions about long documents in its own words.

    python examples/finetune_question_answering.py --model allenai/led-base-16384 \
        --dataset deepmind/narrativeqa --max-train 100 --max-eval 20
    python examples/finetune_question_answering.py --model my-led \
        --data-file train.jsonl --eval-file validation.jsonl --test-file test.jsonl

A row of a data file (csv, json, jsonl or parquet) has a "document" and "queries", a list of
{"query", "answer"}; or a "query" and its "answer", a text or a list of right texts. NarrativeQA is
streamed: each of its rows repeats a whole book, of which one copy is kept. What is held
out, `predictions.jsonl` and the options are as in `finetune_classification.py`. An LED or
BigBird-Pegasus is converted on the fly.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Seq2SeqTrainer, set_seed

from adaptive_longformer.training.document_pairs import DocumentPair, pairs_of_row
from adaptive_longformer.training.script_arguments import (
    DataArguments,
    Seq2SeqRunArguments,
    option,
    parse_script_arguments,
)
from adaptive_longformer.training.script_data import Splits, load_splits
from adaptive_longformer.training.script_run import (
    one_line_for_mistakes,
    train_and_evaluate,
    write_predictions,
)
from adaptive_longformer.training.take_over import take_over_checkpoint
from adaptive_longformer.training.text_metrics import AnswerMetric, TextsMetric
from adaptive_longformer.training.text_to_text_collator import TextToTextCollator


@dataclass
class Arguments(DataArguments):
    max_length: int = option(16384, help="tokens read per document")
    max_target_length: int = 64
    document_column: str = "document"
    target_column: str = "answer"
    max_train: int | None = option(
        default=None, help="questions (documents of --dataset) to train on, the first ones"
    )
    max_eval: int | None = option(
        default=None, help="questions (documents of --dataset) to evaluate on, the first ones"
    )
    num_beams: int = 4

    def pairs(self, place: str, row: dict[str, Any]) -> Iterator[DocumentPair]:
        return pairs_of_row(place, row, self.document_column, self.target_column)


def parse_arguments(argv: list[str] | None = None) -> tuple[Arguments, Seq2SeqRunArguments]:
    return parse_script_arguments(
        Arguments, Seq2SeqRunArguments, argv, "Fine-tune question answering over documents.",
        output_dir="outputs/question_answering",
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
        predict_with_generate=True, remove_unused_columns=False,
    )  # fmt: skip


def narrative_pairs(rows: Iterable[dict], max_documents: int) -> list[DocumentPair]:
    """The questions of the first documents of a data set like NarrativeQA.

    Every row of that data set repeats the whole book or script; here the rows of a document share
    one text, so that it can be streamed.

    Args:
        rows: {"document": {"id", "text"}, "question": {"text"}, "answers": [{"text"}]}, the rows of
            a document next to each other.
        max_documents: stop after so many documents.
    """
    documents: dict[str, str] = {}
    pairs = []
    for row in rows:
        name = row["document"]["id"]
        if name not in documents:
            if len(documents) == max_documents:
                break
            documents[name] = row["document"]["text"]
        answers = [answer["text"] for answer in row["answers"]]
        pairs.append(
            DocumentPair(document=documents[name], query=row["question"]["text"], targets=answers)
        )
    return pairs


def load_pairs(data: Arguments) -> Splits:
    if data.data_file:
        return load_splits(data, data.pairs, group=lambda pair: pair["document"])
    limits = {"train": data.max_train, "validation": data.max_eval, "test": data.max_eval}
    return Splits(
        *(
            narrative_pairs(load_dataset(data.dataset, split=split, streaming=True), limit or 50)
            for split, limit in limits.items()
        )
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    data, args = parse_arguments(argv)

    # Data
    with one_line_for_mistakes():
        splits = load_pairs(data)
        converted = Path(args.output_dir) / "converted"
        model_path = take_over_checkpoint(data.model, converted, data.max_length)
    limits = (data.max_train, data.max_eval) if data.data_file else (None, None)
    train = splits.train if data.streaming else splits.train[: limits[0]]
    held_out = splits.eval[: limits[1]]
    tokenizer = AutoTokenizer.from_pretrained(model_path)

    # Model
    set_seed(args.seed)
    model = AutoModelForSeq2SeqLM.from_pretrained(
        model_path, default_global_tokens="question", **data.model_options
    )
    # Saved with the model: `adaptive-longformer answer` writes as it is evaluated here.
    model.generation_config.update(num_beams=data.num_beams, max_length=data.max_target_length)
    collator = TextToTextCollator(
        tokenizer,
        max_length=min(data.max_length, model.config.max_sequence_length),
        max_target_length=data.max_target_length,
    )
    print(f"{collator.coverage(held_out):.1%} of the documents' tokens are read", flush=True)

    # Trainer
    metric = AnswerMetric()
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
