"""docs/architecture.md names the way that a tensor takes, and files that exist."""

import re
import sys
from pathlib import Path

import pytest
import torch
from doc_pages import ROOT
from transformers import AutoModelForSequenceClassification

import adaptive_longformer
from adaptive_longformer.testing import tiny_config

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def named(part: str) -> list[str]:
    """The files that a part of the page names, in its order."""
    text = PAGE.split(f"<!-- {part} -->")[1].split("<!-- end -->")[0]
    return re.findall(r"`((?:modeling|configuration|adaptive_longformer)/[\w/]+\.py)`", text)


def entered_files() -> list[str]:
    """Our files in the order in which a forward pass enters them, after a first one."""
    model = AutoModelForSequenceClassification.from_config(tiny_config(attention_backend="cpp"))
    input_ids = torch.randint(5, 90, (1, 1000))
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    model(**inputs)
    files: dict[str, None] = {}

    def see(frame, event, argument):
        if event == "call":
            files.setdefault(frame.f_code.co_filename)

    previous = sys.getprofile()
    sys.setprofile(see)
    try:
        model(**inputs)
    finally:
        sys.setprofile(previous)
    root = Path(adaptive_longformer.__file__).resolve().parents[1]
    paths = [Path(file).resolve() for file in files]
    ours = [path.relative_to(root) for path in paths if path.is_relative_to(root)]
    rooms = ("adaptive_longformer", "configuration", "modeling")
    return [str(path) for path in ours if path.parts[0] in rooms]


def test_a_tensor_takes_the_way_that_the_page_names():
    query = torch.randn(1, 1, 1000, 16)
    window = adaptive_longformer.patterns.SlidingWindow(16)
    if reason := adaptive_longformer.explain_backends(query, query, query, window)["cpp"]:
        pytest.skip(f"the walk ends in the C++ kernels: {reason}")
    entered, walk, side = entered_files(), named("walk"), named("side")
    assert [file for file in entered if file not in side] == walk
    assert set(side) <= set(entered)


def test_the_way_is_short():
    # The last one is the C++ source.
    assert len(named("walk")) + 1 <= 12
    assert len(named("choice")) <= 4


def test_named_files_exist():
    names = re.findall(r"`([\w/]+/[\w.]+\.\w+)`", PAGE)
    assert len(names) > 20
    for name in names:
        places = (ROOT / name, ROOT / "adaptive_longformer" / name)
        assert any(place.is_file() for place in places), name
