r"""Embed long documents, and fine-tune for search, with sentence-transformers.

    python examples/embed_documents.py --model sentence-transformers/all-MiniLM-L6-v2 \
        --data-file papers.jsonl --max-length 4096
    python examples/embed_documents.py --model my-embedder --data-file papers.jsonl --epochs 0

A line of the data file has a "document" and a "query" that it answers, or a text in
`--query-column`, as a summary. The last tenth is held out: for every query of it, its documents are
ranked. The model is a folder or hub id of sentence-transformers, or a plain encoder, which then
pools the mean of its tokens; a BERT, RoBERTa or Longformer is converted on the fly, to as many
positions as `--max-length` asks for. What is saved is a folder of sentence-transformers, with the
embeddings of all documents beside it.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset

from adaptive_longformer.gpu import has_bfloat16_gpu
from adaptive_longformer.training.data_files import read_rows, text_of
from adaptive_longformer.training.take_over import take_over_checkpoint


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Embed long documents.")
    parser.add_argument("--model", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--data-file", required=True, help="csv, json, jsonl or parquet file")
    parser.add_argument("--document-column", default="document")
    parser.add_argument("--query-column", default="query")
    parser.add_argument("--output", default="outputs/embeddings")
    parser.add_argument("--max-length", type=int, default=4096, help="tokens read per document")
    parser.add_argument("--epochs", type=float, default=1, help="0 only embeds")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--batch-size", type=int, default=8, help="pairs per step: the others of a "
                        "batch are the wrong answers")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    return parser.parse_args(argv)


def load_pairs(args: argparse.Namespace) -> Dataset:
    """Queries and the documents that answer them."""
    pairs: dict[str, list[str]] = {"query": [], "document": []}
    for place, row in read_rows(args.data_file):
        for name, column in (("query", args.query_column), ("document", args.document_column)):
            pairs[name].append(text_of(place, row, column))
    if len(pairs["query"]) < 2:
        raise ValueError(f"{args.data_file} has one pair, at least two are needed")
    return Dataset.from_dict(pairs)


def share_found_first(queries: torch.Tensor, documents: torch.Tensor) -> float:
    """The share of queries whose own document is the most similar one, [pairs, size] each."""
    best = (queries @ documents.T).argmax(dim=1)
    return float((best == torch.arange(len(queries), device=best.device)).float().mean())


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse_arguments(argv)
    output = Path(args.output)

    # Data
    try:
        pairs = load_pairs(args)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    try:
        from sentence_transformers import (
            SentenceTransformer,
            SentenceTransformerTrainer,
            SentenceTransformerTrainingArguments,
        )
        from sentence_transformers.sentence_transformer.losses import (
            CachedMultipleNegativesRankingLoss,
        )
    except ImportError as error:
        raise SystemExit(f"{error}: pip install sentence-transformers") from error
    cut = len(pairs) - max(1, len(pairs) // 10)
    train, held_out = pairs.select(range(cut)), pairs.select(range(cut, len(pairs)))

    # Model
    model_path = take_over_checkpoint(args.model, output / "converted", args.max_length)
    model = SentenceTransformer(model_path, device="cpu" if args.cpu else None)
    model.max_seq_length = min(args.max_length, model[0].auto_model.config.max_sequence_length)

    def embed(texts: list[str]) -> torch.Tensor:
        return model.encode(
            texts, batch_size=args.batch_size, convert_to_tensor=True, normalize_embeddings=True
        )

    def found_first() -> float:
        return share_found_first(embed(held_out["query"][:]), embed(held_out["document"][:]))

    result = {"found_first_before": found_first()}
    if args.epochs > 0:
        # TrainingArguments
        training_args = SentenceTransformerTrainingArguments(
            output_dir=str(output),
            num_train_epochs=args.epochs,
            learning_rate=args.learning_rate,
            warmup_steps=0.1,
            per_device_train_batch_size=args.batch_size,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
            bf16=not args.cpu and has_bfloat16_gpu(),
            use_cpu=args.cpu,
        )

        # Trainer
        # In pieces of one pair: a long document needs the memory of several short ones.
        loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=1)
        trainer = SentenceTransformerTrainer(
            model=model, args=training_args, train_dataset=train, loss=loss
        )
        trainer.train()
        result["found_first"] = found_first()
    model.save(str(output / "model"))
    torch.save(embed(pairs["document"][:]).cpu(), output / "embeddings.pt")
    (output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    for name, value in result.items():
        print(f"{name:>20}: {value:.4f}")
    return result


if __name__ == "__main__":
    main()
