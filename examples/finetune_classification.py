r"""Fine-tune a long-document classifier with the Trainer.

    python examples/finetune_classification.py --model allenai/longformer-base-4096 \
        --data-file documents.jsonl
    accelerate launch examples/finetune_classification.py --model my-checkpoint \
        --dataset ccdv/patent-classification

The data file (csv, json, jsonl or parquet) has a text and a label column; a fifth of it,
stratified, is held out. A Longformer, RoBERTa or BERT is converted on the fly, to as many positions
as `--max-length` asks for. Which tokens are global is left to the model's configuration, so that a
pipeline on the result scores as the training does.
"""

import argparse
import json
from pathlib import Path

from accelerate import PartialState
from datasets import ClassLabel, DatasetDict, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

from adaptive_longformer.gpu import has_bfloat16_gpu
from adaptive_longformer.training import (
    classification_metrics,
    load_labelled_documents,
    stratified_split,
)
from adaptive_longformer.training.resume import last_complete_checkpoint
from adaptive_longformer.training.take_over import take_over_checkpoint


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a long-document classifier.")
    parser.add_argument("--model", required=True, help="checkpoint folder or hub id")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data-file", help="csv, json, jsonl or parquet file")
    data.add_argument("--dataset", help="hub id of a data set")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--output", default="outputs/classification")
    parser.add_argument("--max-length", type=int, default=4096, help="tokens read per document")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--batch-size", type=int, default=8, help="documents per step and process")
    parser.add_argument("--gradient-accumulation", type=int, default=1)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order")
    parser.add_argument("--split-seed", type=int, default=0, help="of the held-out fifth")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    return parser.parse_args(argv)


def load_documents(args: argparse.Namespace) -> DatasetDict:
    """Splits "train" and "test" with the columns "text" and "label"."""
    if args.data_file:
        documents = load_labelled_documents(
            args.data_file, text_column=args.text_column, label_column=args.label_column
        )
        return stratified_split(documents, seed=args.split_seed)
    documents = load_dataset(args.dataset)
    documents = documents.rename_columns(
        {
            column: name
            for column, name in ((args.text_column, "text"), (args.label_column, "label"))
            if column != name
        }
    ).select_columns(["text", "label"])
    if not isinstance(documents["train"].features["label"], ClassLabel):
        documents = documents.class_encode_column("label")
    if "test" not in documents:
        return stratified_split(documents["train"], seed=args.split_seed)
    return documents


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse_arguments(argv)
    output = Path(args.output)
    PartialState(cpu=args.cpu)

    # Data
    try:
        documents = load_documents(args)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    names = documents["train"].features["label"].names
    model_path = take_over_checkpoint(args.model, output / "converted", args.max_length)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    config = AutoConfig.from_pretrained(model_path)
    # Saved with the model: a pipeline with truncation=True reads what is read here.
    tokenizer.model_max_length = min(args.max_length, config.max_sequence_length)
    encoded = documents.map(
        lambda batch: tokenizer(batch["text"], truncation=True),
        batched=True,
        remove_columns="text",
    )

    # Model
    set_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_path,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        ignore_mismatched_sizes=True,
    )
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()

    # TrainingArguments
    training_args = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        warmup_steps=0.1,
        weight_decay=0.01,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation,
        train_sampling_strategy="group_by_length",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=10,
        report_to="none",
        seed=args.seed,
        bf16=not args.cpu and has_bfloat16_gpu(),
        use_cpu=args.cpu,
    )

    # Trainer
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=encoded["train"],
        eval_dataset=encoded["test"],
        processing_class=tokenizer,
        compute_metrics=classification_metrics,
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(output) if args.resume else None)
    metrics = trainer.evaluate()
    trainer.save_model()
    result = {
        name: metrics[f"eval_{name}"] for name in ("accuracy", "balanced_accuracy", "macro_f1")
    }
    result["test_size"] = len(encoded["test"])
    if trainer.is_world_process_zero():
        (output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        for name, value in result.items():
            print(f"{name:>18}: {value:.4f}" if name != "test_size" else f"{name:>18}: {value}")
    return result


if __name__ == "__main__":
    main()
