"""How near does sparse attention come to full attention, with real weights on real documents?

    python benchmarks/fidelity.py --model BERT_FOLDER --data-file documents.jsonl

A pretrained BERT or RoBERTa is converted to read long documents, its position table repeated. It
then reads the same documents with full attention and with each pattern, without any training. What
counts is how far the pattern's token states are from those of full attention (error: norm of the
difference over the norm) and how alike the mean states of the documents are (cosine). Every row
states its keys per query.

A repeated table leads the choice: tokens find those at the same position of other copies. So
everything is measured a second time with a table of which every row is the mean of all, where
positions say nothing; full attention too is then that of such a model.
"""

import argparse
import json
import statistics
import sys
import tempfile

import torch
from side_by_side.measure import environment
from side_by_side.report import write_json
from side_by_side.results import add_results_arguments, results_folder
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer

from adaptive_longformer import AdaptiveSparseConfig, convert_checkpoint
from adaptive_longformer.analysis.sparsity import sparsity_report
from adaptive_longformer.configuration.configuration_adaptive_sparse import SELECTING_PATTERNS

TABLES = ("repeated", "averaged")
SHORTEST = 1024


def variants(keys: int, with_oracle: bool) -> dict[str, dict]:
    """Patterns with about so many keys per query, and what they are called. What chooses has half
    of them in the window and half in blocks of the default size.
    """
    blocks = keys // 2 // AdaptiveSparseConfig().block_size
    selecting = {"attention_window": keys // 2, "num_selected_blocks": blocks}
    found = {
        f"window of {keys}": {"attention_pattern": "longformer", "attention_window": keys},
        f"random blocks, {keys} keys": {"attention_pattern": "random_selection", **selecting},
        f"adaptive, {keys} keys": {"attention_pattern": "adaptive", **selecting},
        f"adaptive, sampled, {keys} keys": {
            "attention_pattern": "adaptive", "selection_sampling": True, **selecting,
        },
    }  # fmt: skip
    if with_oracle:
        found[f"exact mass, {keys} keys"] = {"attention_pattern": "oracle", **selecting}
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="BERT or RoBERTa: folder or hub id")
    parser.add_argument("--data-file", required=True, help="jsonl with a column of texts")
    parser.add_argument("--column", default="document")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096, help="tokens read per document")
    parser.add_argument("--keys", type=int, nargs="+", default=[256, 512, 1024], help="per query")
    parser.add_argument(
        "--no-oracle", action="store_true", help="leave out what takes the memory of full attention"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_results_arguments(parser)
    args = parser.parse_args()
    if args.length < SHORTEST:
        parser.error(f"--length is {args.length}, at least {SHORTEST} is needed")
    return args


def read_documents(args: argparse.Namespace, tokenizer) -> list[dict[str, torch.Tensor]]:
    """The first documents of the file, cut at `length` tokens."""
    documents = []
    with open(args.data_file, encoding="utf-8") as lines:
        for line, _ in zip(lines, range(args.documents)):
            text = json.loads(line)[args.column]
            inputs = tokenizer(text, truncation=True, max_length=args.length, return_tensors="pt")
            documents.append(inputs.to(args.device))
    return documents


@torch.no_grad()
def states(folder: str, table: str, fields: dict, documents: list[dict[str, torch.Tensor]]):
    """Last hidden states of every document, [length, hidden_size], and the keys per query."""
    device = documents[0]["input_ids"].device
    model = AutoModel.from_pretrained(folder, **fields).eval().to(device)
    if table == "averaged":
        weight = model.embeddings.position_embeddings.weight[model.config.position_offset :]
        weight.copy_(weight.mean(dim=0).expand_as(weight))
    keys = None
    if fields["attention_pattern"] in SELECTING_PATTERNS:
        model.set_selection_strength(1.0)
        keys = sparsity_report(model, documents[0]).keys_per_query
    return [model(**inputs).last_hidden_state[0] for inputs in documents], keys


def measure(args: argparse.Namespace, folder: str, documents: list, table: str) -> list[dict]:
    """A row for every pattern; says it too."""
    expected, _ = states(folder, table, {"attention_pattern": "full"}, documents)
    rows = []
    for wanted in args.keys:
        for name, fields in variants(wanted, with_oracle=not args.no_oracle).items():
            found, keys = states(folder, table, fields, documents)
            pairs = list(zip(found, expected, strict=True))
            row = {
                "table": table,
                "name": name,
                "keys_per_query": wanted if keys is None else round(keys),
                "error": statistics.mean(float((a - b).norm() / b.norm()) for a, b in pairs),
                "cosine": statistics.mean(
                    float(cosine_similarity(a.mean(dim=0), b.mean(dim=0), dim=0)) for a, b in pairs
                ),
            }
            rows.append(row)
            print(
                f"{table} positions, {name:<26} {row['keys_per_query']:5} keys per query, error "
                f"{row['error']:.3f}, cosine {row['cosine']:.3f}",
                flush=True,
            )
    return rows


def main() -> int:
    args = parse_arguments()
    results = results_folder(args)
    with tempfile.TemporaryDirectory() as scratch:
        folder = f"{scratch}/model"
        convert_checkpoint(args.model, folder, max_positions=args.length)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        documents = read_documents(args, tokenizer)
        rows = [row for table in TABLES for row in measure(args, folder, documents, table)]
    write_json(
        results / f"fidelity_{args.length}.json",
        tokens=[inputs["input_ids"].shape[1] for inputs in documents],
        rows=rows,
        environment=environment(torch.device(args.device)),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
