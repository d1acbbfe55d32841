import pytest
import torch

from adaptive_longformer.modeling.default_global_tokens import default_global_mask

PAD, CLS, SEP = 1, 0, 2


def mask_of(strategy, ids, sep_token_id=SEP, token_type_ids=None):
    input_ids = torch.tensor([ids])
    types = None if token_type_ids is None else torch.tensor([token_type_ids])
    mask = default_global_mask(
        strategy,
        input_ids != PAD,
        input_ids=input_ids,
        token_type_ids=types,
        sep_token_id=sep_token_id,
    )
    return None if mask is None else mask[0].int().tolist()


def test_none_has_no_global_tokens():
    assert mask_of("none", [CLS, 9, SEP]) is None


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([CLS, 9, SEP, PAD], [1, 0, 0, 0]),
        ([PAD, PAD, CLS, 9], [0, 0, 1, 0]),
        ([PAD, PAD, PAD, PAD], [0, 0, 0, 0]),
        ([CLS], [1]),
    ],
)
def test_first_is_the_first_valid_token(ids, expected):
    assert mask_of("first", ids) == expected


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([CLS, 9, 8, SEP, SEP, 7, SEP], [1, 1, 1, 0, 0, 0, 0]),  # RoBERTa's pair
        ([CLS, 9, 8, SEP, 7, 7, SEP], [1, 1, 1, 0, 0, 0, 0]),  # BERT's pair
        ([CLS, 9, 8, SEP, 7, 7, 7], [1, 1, 1, 0, 0, 0, 0]),  # truncated: one separator
        ([CLS, 9, 8, 7, 7, 7, SEP], [1, 0, 0, 0, 0, 0, 0]),  # a document alone
        ([CLS, 9, 8, SEP, PAD, PAD, PAD], [1, 0, 0, 0, 0, 0, 0]),
        ([CLS, 9, 8, 7, 7, 7, 7], [1, 0, 0, 0, 0, 0, 0]),  # none
        ([SEP, 9, 8, 7, 7, 7, 7], [1, 0, 0, 0, 0, 0, 0]),  # nothing before it
        ([PAD, PAD, CLS, 9, SEP, 7, SEP], [0, 0, 1, 1, 0, 0, 0]),
        ([CLS, 9, SEP, 7, SEP, 6, SEP], [1, 1, 0, 0, 0, 0, 0]),
        ([PAD] * 7, [0] * 7),
    ],
)
def test_question_is_before_the_first_of_any_number_of_separators(ids, expected):
    assert mask_of("question", ids) == expected


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([CLS, 9, 8, SEP, SEP, 7, SEP], [0, 0, 0, 0, 0, 1, 1]),
        ([CLS, 9, 8, SEP, 7, 7, SEP], [0, 0, 0, 0, 1, 1, 1]),
        ([CLS, 9, 8, SEP, SEP, PAD, PAD], [1, 0, 0, 0, 0, 0, 0]),  # nothing after it
        ([CLS, 9, 8, 7, 7, 7, 7], [1, 0, 0, 0, 0, 0, 0]),
        ([CLS, 9, SEP, SEP, 7, SEP, PAD], [0, 0, 0, 0, 1, 1, 0]),
    ],
)
def test_after_separator_skips_a_doubled_separator(ids, expected):
    assert mask_of("after_separator", ids) == expected


def test_question_without_a_separator_token_reads_token_types():
    ids, types = [CLS, 9, 8, 7, 7, PAD], [0, 0, 0, 1, 1, 0]
    assert mask_of("question", ids, None, types) == [1, 1, 1, 0, 0, 0]
    assert mask_of("question", ids, None, [0] * 6) == [1, 0, 0, 0, 0, 0]  # no second segment
    assert mask_of("question", ids, None) == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("strategy", ["question", "after_separator"])
def test_embeddings_without_ids_fall_back_to_the_first_valid_token(strategy):
    valid = torch.tensor([[False, True, True]])
    mask = default_global_mask(strategy, valid, sep_token_id=SEP)
    assert mask is not None
    assert mask.tolist() == [[False, True, False]]


def test_rows_are_independent():
    ids = torch.tensor([[CLS, 9, SEP, 7], [CLS, 9, 8, 7]])
    mask = default_global_mask("question", ids != PAD, input_ids=ids, sep_token_id=SEP)
    assert mask is not None
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
