"""Words that are masked as far away stand nowhere near, and are shown elsewhere."""

import importlib
import random
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def masked_names(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("masked_names")


def random_piece(length, seed):
    """Words of one or two tokens, of which some stand several times."""
    draw = random.Random(seed)
    names = [
        "name" + "".join(draw.choices("abcdefgh", k=4)) + letter for letter in "abcdefghij" * 30
    ]
    ids, words = [1], []
    while len(ids) < length - 1:
        name = draw.choice(names) if draw.random() < 0.5 else draw.choice(["of", "the", "7", "und"])
        size = min(1 + len(name) % 2, length - 1 - len(ids))
        words.append([len(ids), len(ids) + size, name])
        ids += [10 + sum(map(ord, name)) % 1000] * size
    return {"ids": torch.tensor([*ids, 2]), "words": words}


@pytest.mark.parametrize("far", [32, 256])
def test_far_words_are_masked_everywhere_near_and_shown_far_away(masked_names, far):
    asked = 0
    for seed in range(5):
        piece = random_piece(2048, seed)
        generator = torch.Generator().manual_seed(seed)
        ids, labels, is_far = masked_names.mask_piece(piece, 5, generator, far=far)
        is_masked = labels >= 0
        assert torch.equal(ids == 5, is_masked) and not (is_far & ~is_masked).any()
        assert torch.equal(labels[is_masked], piece["ids"][is_masked])
        assert 0.1 < is_masked.float().mean() < 0.4
        for first, last, name in piece["words"]:
            if not is_far[first]:
                continue
            asked += 1
            assert is_far[first:last].all() and len(name) >= 4
            shown = [
                abs(begin - first)
                for begin, end, other in piece["words"]
                if other == name and not is_masked[begin:end].all()
            ]
            assert shown and min(shown) > far
    assert asked > 100


def test_a_step_has_the_same_piece_whenever_training_begins(masked_names):
    documents = [[random_piece(2048, 0), random_piece(2048, 1)]]
    whole = list(masked_names.batches(documents, 5, range(6), seed=3, size=1, far=256))
    rest = list(masked_names.batches(documents, 5, range(4, 6), seed=3, size=1, far=256))
    for (ids, labels), (others, other_labels) in zip(whole[4:], rest, strict=True):
        assert torch.equal(ids, others) and torch.equal(labels, other_labels)
    assert not torch.equal(whole[4][0], whole[5][0])
