"""The model cards in model_cards/ hold the numbers of benchmarks/results, as the hub reads them."""

import json
import runpy
from pathlib import Path

import pytest
from doc_pages import ROOT
from huggingface_hub import ModelCard

CARDS = sorted(path for path in (ROOT / "model_cards").glob("*.md") if path.name != "README.md")
RESULTS = ROOT / "benchmarks" / "results"


def values_of(card: ModelCard) -> dict:
    """(dataset's configuration, metric) -> value, as huggingface_hub parses it."""
    return {
        (result.dataset_config, result.metric_type): result.metric_value
        for result in card.data.eval_results
    }


def test_cards_are_what_the_results_say():
    made = runpy.run_path(str(ROOT / "docs" / "make" / "model_cards.py"))["ALL"]
    assert [path.stem for path in CARDS] == sorted(made)
    for path in CARDS:
        assert path.read_text(encoding="utf-8") == made[path.stem](), "make docs-data writes it"


def test_the_hub_reads_the_numbers_of_hyperpartisan():
    results = json.loads((RESULTS / "hyperpartisan.json").read_text())
    run = next(run for run in results["arms"]["first 2048 (converted)"] if run["seed"] == 0)
    card = ModelCard.load(ROOT / "model_cards" / "minilm-2k-hyperpartisan.md")
    assert values_of(card) == {
        ("byarticle", "accuracy"): run["accuracy"],
        ("byarticle", "balanced_accuracy"): run["balanced_accuracy"],
        ("byarticle", "f1"): run["macro_f1"],
    }
    assert f"{100 * run['accuracy']:.1f} | {100 * run['balanced_accuracy']:.1f}" in card.text


def test_the_hub_reads_the_numbers_of_needles():
    for line in (RESULTS / "pattern_quality_full.jsonl").read_text().splitlines():
        run = json.loads(line)
        found = tuple(run[name] for name in ("part", "task", "seed", "variant"))
        if found == ("patterns", "needles", 0, "adaptive"):
            break
    else:
        pytest.fail("the results have no such run")
    card = ModelCard.load(ROOT / "model_cards" / "adaptive-needles.md")
    assert values_of(card) == {
        (f"{length} tokens", "accuracy"): numbers["far"]
        for length, numbers in run["by_length"].items()
    }


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_cards_say_what_the_hub_and_a_reader_need(path: Path):
    card = ModelCard.load(path)
    data = card.data
    assert data.library_name == "transformers"
    assert "adaptive_sparse" in data.tags
    assert data.license and data.pipeline_tag and data.model_name == path.stem
    for part in ("## Use", "from_pretrained", "## Results", "## Limits", "parity with"):
        assert part in card.text
