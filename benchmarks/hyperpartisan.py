"""Does reading the whole article help, and must every token be read by every token? The same
pretrained BERT weights cut at 512 tokens, and converted to long inputs: a sliding window, a window
with chosen blocks, full attention.

    python benchmarks/hyperpartisan.py --model BERT_FOLDER --data-file train.jsonl --seeds 0 1 2

One stratified 80/20 split for all runs; a seed sets the new head, the order and the dropout. All
arms are fine-tuned with the same Trainer settings, the adaptive one as the README recommends. Every
finished run is written at once, so that an interrupted call goes on where it was.
"""

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from datasets import DatasetDict
from side_by_side.results import add_results_arguments, commit_of_the_tree, results_folder
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

from adaptive_longformer import convert_checkpoint
from adaptive_longformer.gpu import has_bfloat16_gpu
from adaptive_longformer.training import (
    GlobalAttentionCollator,
    SelectionRampCallback,
    adaptive_parameter_groups,
    classification_metrics,
    load_labelled_documents,
    stratified_split,
)

WEIGHT_DECAY = 0.01
METRICS = ("accuracy", "balanced_accuracy", "macro_f1")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="BERT checkpoint: folder or hub id")
    parser.add_argument("--data-file", required=True, help="documents with text and label")
    add_results_arguments(parser, "benchmarks/results")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument(
        "--merge",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="take the runs of earlier calls with the same settings from their --results",
    )
    parser.add_argument("--split-seed", type=int, default=0)
    parser.add_argument("--long", type=int, default=2048, help="tokens of the long arm")
    parser.add_argument("--short", type=int, default=512, help="tokens of the truncated arm")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--attention-dropout",
        type=float,
        default=0.0,
        help="of all arms; 0 is twice as fast on a CPU",
    )
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    return parser.parse_args()


class Arm(NamedTuple):
    folder: str
    max_length: int
    attention_pattern: str | None = None


def fine_tune(args: argparse.Namespace, arm: Arm, documents: DatasetDict, seed: int) -> dict:
    """One run: metrics on the held-out documents and its time."""
    folder, max_length, attention_pattern = arm
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = documents.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=max_length),
        batched=True,
        remove_columns="text",
    )
    set_seed(seed)
    options = {} if attention_pattern is None else {"attention_pattern": attention_pattern}
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, attention_probs_dropout_prob=args.attention_dropout, **options
    )
    collator = GlobalAttentionCollator(tokenizer, num_labels=2, max_length=max_length)

    def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = collator(examples)
        if model.config.model_type != "adaptive_sparse":
            del batch["global_attention_mask"]  # BERT knows none.
        return batch

    optimizer = None
    if attention_pattern == "adaptive":
        groups = adaptive_parameter_groups(model, args.learning_rate, weight_decay=WEIGHT_DECAY)
        optimizer = torch.optim.AdamW(groups)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                num_train_epochs=args.epochs,
                learning_rate=args.learning_rate,
                warmup_steps=0.1,
                weight_decay=WEIGHT_DECAY,
                per_device_train_batch_size=args.batch_size,
                per_device_eval_batch_size=args.batch_size,
                train_sampling_strategy="group_by_length",
                save_strategy="no",
                logging_steps=10,
                report_to="none",
                seed=seed,
                bf16=not args.cpu and has_bfloat16_gpu(),
                use_cpu=args.cpu,
            ),
            data_collator=collate,
            train_dataset=encoded["train"],
            eval_dataset=encoded["test"],
            compute_metrics=classification_metrics,
            optimizers=(optimizer, None),
            callbacks=[SelectionRampCallback()] if optimizer is not None else None,
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        metrics = trainer.evaluate()
    return {
        "seed": seed,
        **{name: metrics[f"eval_{name}"] for name in METRICS},
        "training_seconds": round(seconds, 1),
    }


def markdown(results: dict) -> str:
    """The table of the README, and what the size of the test set means."""
    rows = [
        "| tokens read | seeds | accuracy | balanced accuracy | macro F1 |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm, runs in results["arms"].items():
        cells = []
        for name in METRICS:
            values = [100 * run[name] for run in runs]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        rows.append(f"| {arm} | {len(runs)} | {' | '.join(cells)} |")
    accuracies = [run["accuracy"] for runs in results["arms"].values() for run in runs]
    mean, test_size = statistics.mean(accuracies), results["test_size"]
    error = 100 * math.sqrt(mean * (1 - mean) / test_size)
    rows += [
        "",
        "Percent, mean ± standard deviation over seeds (new head, order, dropout; one split). The "
        "test set has "
        f"{test_size} articles: the binomial standard error of one accuracy is {error:.1f} points, "
        "so that a difference "
        f"of two arms under about {2 * error:.0f} points says nothing. "
        f"{results['longer_than_short']} of the test "
        f"articles are longer than {results['settings']['short']} tokens. Answering the larger "
        "class scores "
        f"{100 * results['majority_accuracy']:.1f}.",
    ]
    return "\n".join(rows) + "\n"


def take_runs(results: dict, file: Path) -> None:
    """Add the runs of an earlier call that had the same settings, one for each seed."""
    if not file.exists():
        return
    earlier = json.loads(file.read_text())
    if earlier["settings"] != results["settings"]:
        raise SystemExit(f"{file} has other settings: {earlier['settings']}")
    for arm, runs in earlier["arms"].items():
        own = results["arms"].setdefault(arm, [])
        own += [run for run in runs if run["seed"] not in {known["seed"] for known in own}]
        own.sort(key=lambda run: run["seed"])


def write(results: dict, folder: Path) -> None:
    (folder / "hyperpartisan.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "hyperpartisan.md").write_text(markdown(results))


def main() -> None:
    args = parse_arguments()
    folder = results_folder(args)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        name: getattr(args, name)
        for name in (
            "long",
            "short",
            "epochs",
            "learning_rate",
            "batch_size",
            "attention_dropout",
            "split_seed",
        )
    }
    on_gpu = not args.cpu and torch.cuda.is_available()
    documents = stratified_split(load_labelled_documents(args.data_file), seed=args.split_seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    lengths = [
        len(ids) for ids in tokenizer(list(documents["test"]["text"]), verbose=False)["input_ids"]
    ]
    share = sum(documents["test"]["label"]) / len(lengths)
    results = {
        "settings": settings,
        "train_size": len(documents["train"]),
        "test_size": len(lengths),
        "majority_accuracy": max(share, 1 - share),
        "longer_than_short": sum(length > args.short for length in lengths),
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": "cpu" if not on_gpu else torch.cuda.get_device_name(),
            "dtype": "bfloat16" if on_gpu and has_bfloat16_gpu() else "float32",
            "commit": commit_of_the_tree(),
        },
        "arms": {},
    }
    for earlier in (folder, *map(Path, args.merge)):
        take_runs(results, earlier / "hyperpartisan.json")

    with tempfile.TemporaryDirectory() as scratch:
        converted = str(Path(scratch) / "converted")
        convert_checkpoint(args.model, converted, max_positions=args.long)
        arms = {
            f"first {args.short} (BERT)": Arm(args.model, args.short),
            f"first {args.long} (converted)": Arm(converted, args.long),
            f"first {args.long} (adaptive)": Arm(converted, args.long, "adaptive"),
            f"first {args.long} (full attention)": Arm(converted, args.long, "full"),
        }
        for seed in args.seeds:
            for name, arm in arms.items():
                runs = results["arms"].setdefault(name, [])
                if any(run["seed"] == seed for run in runs):
                    continue
                runs.append(fine_tune(args, arm, documents, seed))
                print(name, runs[-1], flush=True)
                write(results, folder)
    write(results, folder)
    print(markdown(results))


if __name__ == "__main__":
    main()
