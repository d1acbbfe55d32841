"""Writes the model cards of checkpoints that the benchmarks train, from benchmarks/results.

    python docs/make/model_cards.py

A test compares what is committed with what this writes.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
CARDS = ROOT / "model_cards"

LOAD = """## Use

In a clone of the source of adaptive-longformer `pip install .`, then

```python
import adaptive_longformer  # registers the architecture with Transformers
from transformers import {auto_class}{tokenizer}

model = {auto_class}.from_pretrained("{name}")
```

The weights are not published: the command below trains them."""

HYPERPARTISAN = """# {name}

all-MiniLM-L6-v2, a BERT of 6 layers, converted by adaptive-longformer to read {long:,} tokens and
fine-tuned to tell hyperpartisan news articles from others.

| | |
|---|---|
| longest input | {long:,} tokens |
| attention | sliding window of 1,024 tokens, the first token global |
| parity with the source | before fine-tuning: the same logits up to {short} tokens, within 1e-5 |
| trained on | {train_size} articles, {epochs} epochs of batches of {batch_size}, {device} |
| learning rate | {learning_rate:g} |
| training time | {minutes:.0f} minutes |

{load}

## Results

{test_size} articles that no training has seen, percent. This card is of seed {seed}; a seed sets
the new head, the order and the dropout.

{table}

One accuracy has a binomial standard error of about three points, so that no difference in this
table says anything. Answering the larger class scores {majority:.1f}. File:
`benchmarks/results/hyperpartisan.json`.

## Limits

Beyond {short} tokens the positions of the source are repeated. {train_size} articles teach little:
do not judge articles or people by it. English only.

## Made by

```
python benchmarks/hyperpartisan.py --model MINILM --data-file articles.jsonl
```
"""

NEEDLES = """# {name}

A small encoder of adaptive-longformer, trained from scratch, that finds single words far away in
documents of made-up words: every word with a value stands alone, and is asked for elsewhere. A
study object, and the smallest checkpoint that shows what choosing blocks is for.

| | |
|---|---|
| size | 2 layers, {hidden_size} wide, {heads} heads, float32 |
| longest input | 4,096 tokens |
| attention | a window of 128 tokens and chosen blocks: {keys:.0f} keys per query |
| parity with a source | there is no source |
| trained on | {pretraining_steps} steps on what is near, {steps} on {length:,} tokens, {device} |

{load}

## Results

Share of right answers among 16, percent, on documents that no training has seen. This card is of
seed {seed}.

{table}

The same training with a window of 256 tokens and nothing chosen: {window:.1f} percent of the far
ones at {length:,} tokens, mean of {num_seeds} seeds. Full attention: {full:.1f}. File:
`benchmarks/results/pattern_quality_full.jsonl`.

## Limits

It knows no language, has no tokenizer, and can do this task only. Beyond 4,096 tokens a
coarser choice comes first, which loses single words.

## Made by

```
python benchmarks/pattern_quality.py --preset full --parts patterns
```
"""


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def front_matter(**data: Any) -> str:
    tags = ["adaptive_sparse", "long-document", *data.pop("tags")]
    card = ModelCardData(library_name="transformers", tags=tags, **data)
    return f"---\n{card.to_yaml()}\n---\n\n"


def hyperpartisan() -> str:
    """The converted MiniLM of the first seed."""
    results = json.loads((RESULTS / "hyperpartisan.json").read_text(encoding="utf-8"))
    settings = results["settings"]
    run = results["arms"][f"first {settings['long']} (converted)"][0]
    name = "minilm-2k-hyperpartisan"
    metrics = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "macro_f1": "F1"}
    rows = [
        [arm, str(other["seed"]), *(f"{100 * other[metric]:.1f}" for metric in metrics)]
        for arm, runs in results["arms"].items()
        for other in runs
    ]
    load = LOAD.format(
        auto_class="AutoModelForSequenceClassification", tokenizer=", AutoTokenizer", name=name
    )
    text = HYPERPARTISAN.format(
        name=name,
        load=load.replace(
            "\n```\n\nThe", f'\ntokenizer = AutoTokenizer.from_pretrained("{name}")\n```\n\nThe'
        ),
        seed=run["seed"],
        minutes=run["training_seconds"] / 60,
        train_size=results["train_size"],
        test_size=results["test_size"],
        majority=100 * results["majority_accuracy"],
        device=results["environment"]["device"],
        table=markdown(["tokens read", "seed", *metrics.values()], rows),
        **settings,
    )
    evaluation = [
        EvalResult(
            task_type="text-classification",
            dataset_type="SemEvalWorkshop/hyperpartisan_news_detection",
            dataset_name="Hyperpartisan news, by article",
            dataset_config="byarticle",
            dataset_split="a fifth of train, stratified",
            metric_type="f1" if metric == "macro_f1" else metric,
            metric_name=label,
            metric_value=run[metric],
            metric_args={"average": "macro"} if metric == "macro_f1" else None,
        )
        for metric, label in metrics.items()
    ]
    return (
        front_matter(
            tags=["bert"],
            pipeline_tag="text-classification",
            license="apache-2.0",
            language="en",
            base_model="sentence-transformers/all-MiniLM-L6-v2",
            datasets=["SemEvalWorkshop/hyperpartisan_news_detection"],
            model_name=name,
            eval_results=evaluation,
        )
        + text
    )


def needles() -> str:
    """The adaptive model of the first seed."""
    lines = (RESULTS / "pattern_quality_full.jsonl").read_text(encoding="utf-8").splitlines()
    cells = [cell for cell in map(json.loads, lines) if cell["part"] == "patterns"]
    runs = {
        variant: [cell for cell in cells if (cell["task"], cell["variant"]) == ("needles", variant)]
        for variant in ("adaptive", "longformer", "full")
    }
    run = runs["adaptive"][0]
    name = "adaptive-needles"

    def far(variant: str) -> float:
        return 100 * statistics.mean(cell["finetuned"]["far"] for cell in runs[variant])

    rows = [
        [f"{int(length):,}", *(f"{100 * found[place]:.1f}" for place in ("near", "far"))]
        for length, found in run["by_length"].items()
    ]
    text = NEEDLES.format(
        name=name,
        load=LOAD.format(auto_class="AutoModelForTokenClassification", tokenizer="", name=name),
        seed=run["seed"],
        keys=run["keys_per_query"],
        table=markdown(["tokens", "answer within 64 tokens", "more than 256 away"], rows),
        window=far("longformer"),
        full=far("full"),
        num_seeds=len(runs["longformer"]),
        device=run["environment"]["device"],
        **run["settings"],
    )
    evaluation = [
        EvalResult(
            task_type="token-classification",
            dataset_type="needles",
            dataset_name="Needles of benchmarks/quality/tasks.py",
            dataset_config=f"{length} tokens",
            metric_type="accuracy",
            metric_name="accuracy, answer more than 256 tokens away",
            metric_value=found["far"],
        )
        for length, found in run["by_length"].items()
    ]
    return (
        front_matter(
            tags=["synthetic"],
            pipeline_tag="token-classification",
            license="apache-2.0",
            model_name=name,
            eval_results=evaluation,
        )
        + text
    )


ALL = {"minilm-2k-hyperpartisan": hyperpartisan, "adaptive-needles": needles}

if __name__ == "__main__":
    for card_name, make in ALL.items():
        (CARDS / f"{card_name}.md").write_text(make(), encoding="utf-8")
