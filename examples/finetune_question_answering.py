r"""Fine-tune an encoder-decoder to answer questions about long documents in its own words.

    python examples/finetune_question_answering.py --model allenai/led-base-16384 \
        --dataset deepmind/narrativeqa --max-train 100 --max-eval 20
    python examples/finetune_question_answering.py --model my-led \
        --data-file train.jsonl --eval-file validation.jsonl

A row of a data file (csv, json, jsonl or parquet) has a "document" and "queries", a list of
{"query", "answer"}; or a "query" and its "answer", a text or a list of right texts. NarrativeQA is
streamed: each of its rows repeats a whole book, of which one copy is kept. An LED or
BigBird-Pegasus is converted on the fly.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    EvalPrediction,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

from adaptive_longformer.gpu import has_bfloat16_gpu
from adaptive_longformer.training.document_pairs import DocumentPair, load_document_pairs
from adaptive_longformer.training.resume import last_complete_checkpoint
from adaptive_longformer.training.take_over import take_over_checkpoint
from adaptive_longformer.training.text_metrics import AnswerMetric
from adaptive_longformer.training.text_to_text_collator import TextToTextCollator


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune question answering over documents.")
    parser.add_argument("--model", required=True, help="checkpoint folder or hub id")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data-file", help="JSON lines to train on")
    data.add_argument("--dataset", help="hub id of a data set like NarrativeQA")
    parser.add_argument("--eval-file", help="JSON lines to evaluate on (default: a tenth held out)")
    parser.add_argument("--document-column", default="document")
    parser.add_argument("--target-column", default="answer")
    parser.add_argument("--output", default="outputs/question_answering")
    parser.add_argument("--max-length", type=int, default=16384, help="tokens read per document")
    parser.add_argument("--max-target-length", type=int, default=64)
    parser.add_argument(
        "--max-train", type=int, help="questions (documents of --dataset) to train on"
    )
    parser.add_argument(
        "--max-eval", type=int, help="questions (documents of --dataset) to evaluate on"
    )
    parser.add_argument("--num-beams", type=int, default=4)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--batch-size", type=int, default=2, help="documents per step and process")
    parser.add_argument("--gradient-accumulation", type=int, default=4)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    return parser.parse_args(argv)


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


def load_pairs(args: argparse.Namespace) -> tuple[list[DocumentPair], list[DocumentPair]]:
    """Pairs to train and to evaluate on."""
    columns = {"document_column": args.document_column, "target_column": args.target_column}
    if args.data_file:
        train = load_document_pairs(args.data_file, **columns)
        held_out = load_document_pairs(args.eval_file, **columns) if args.eval_file else None
    else:
        train, held_out = (
            narrative_pairs(load_dataset(args.dataset, split=split, streaming=True), limit or 50)
            for split, limit in (("train", args.max_train), ("validation", args.max_eval))
        )
        return train, held_out
    if held_out is None:
        if len(train) < 2:
            raise ValueError(f"{args.data_file} has one text to write, at least two are needed")
        cut = len(train) - max(1, len(train) // 10)
        train, held_out = train[:cut], train[cut:]
    return train[: args.max_train], held_out[: args.max_eval]


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse_arguments(argv)
    output = Path(args.output)
    PartialState(cpu=args.cpu)

    # Data
    try:
        train, held_out = load_pairs(args)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    model_path = take_over_checkpoint(args.model, output / "converted", args.max_length)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    config = AutoConfig.from_pretrained(model_path)
    collator = TextToTextCollator(
        tokenizer,
        max_length=min(args.max_length, config.max_sequence_length),
        max_target_length=args.max_target_length,
    )
    print(f"{collator.coverage(held_out):.1%} of the documents' tokens are read", flush=True)

    # Model
    set_seed(args.seed)
    model = AutoModelForSeq2SeqLM.from_pretrained(model_path, default_global_tokens="question")
    # Saved with the model: `adaptive-longformer answer` writes as it is evaluated here.
    model.generation_config.update(num_beams=args.num_beams, max_length=args.max_target_length)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()

    # TrainingArguments
    training_args = Seq2SeqTrainingArguments(
        output_dir=str(output),
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        warmup_steps=0.1,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=10,
        predict_with_generate=True,
        remove_unused_columns=False,
        report_to="none",
        seed=args.seed,
        bf16=not args.cpu and has_bfloat16_gpu(),
        use_cpu=args.cpu,
    )

    # Trainer
    metric = AnswerMetric()

    def metrics_of(prediction: EvalPrediction) -> dict[str, float]:
        token_ids = np.where(
            prediction.predictions < 0, tokenizer.pad_token_id, prediction.predictions
        )
        texts = tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        return metric.compute(predictions=texts, references=[pair["targets"] for pair in held_out])

    trainer = Seq2SeqTrainer(
        model=model,
        args=training_args,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        compute_metrics=metrics_of,
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(output) if args.resume else None)
    metrics = trainer.evaluate()
    trainer.save_model()
    names = ("loss", "exact_match", "f1")
    result = {name: metrics[f"eval_{name}"] for name in names}
    if trainer.is_world_process_zero():
        (output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        for name, value in result.items():
            print(f"{name:>11}: {value:.4f}")
    return result


if __name__ == "__main__":
    main()
