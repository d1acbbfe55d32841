import pytest
import torch
from transformers import DataCollatorForLanguageModeling, DataCollatorForTokenClassification

from adaptive_longformer.testing import tiny_model
from adaptive_longformer.training.collator import GlobalAttentionCollator
from adaptive_longformer.training.small_longformer import train_byte_level_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_level_tokenizer(["some words to learn from"] * 3, vocab_size=300)


def test_pads_to_the_longest_and_marks_the_first_token(tokenizer):
    batch = GlobalAttentionCollator(tokenizer)(
        [{"input_ids": [0, 7, 2], "label": 1}, {"input_ids": [0, 7, 8, 9, 2], "label": 0}]
    )
    assert batch["input_ids"].tolist() == [[0, 7, 2, 1, 1], [0, 7, 8, 9, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["global_attention_mask"].tolist() == [[1, 0, 0, 0, 0]] * 2
    assert batch["labels"].tolist() == [1, 0]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_first_valid_token_under_left_padding(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "padding_side", "left")
    batch = GlobalAttentionCollator(tokenizer)([{"input_ids": [0, 2]}, {"input_ids": [0, 7, 2]}])
    assert batch["input_ids"].tolist() == [[1, 0, 2], [0, 7, 2]]
    assert batch["global_attention_mask"].tolist() == [[0, 1, 0], [1, 0, 0]]
    assert "labels" not in batch


@pytest.mark.parametrize(
    ("global_tokens", "expected"),
    [
        ("none", [0, 0, 0, 0, 0, 0, 0]),
        ("first", [1, 0, 0, 0, 0, 0, 0]),
        ("question", [1, 1, 0, 0, 0, 0, 0]),
        ("after_separator", [0, 0, 0, 0, 1, 1, 1]),
    ],
)
def test_global_tokens(tokenizer, global_tokens, expected):
    collator = GlobalAttentionCollator(tokenizer, global_tokens=global_tokens)
    batch = collator([{"input_ids": [0, 7, 2, 2, 8, 9, 2]}])
    assert batch["global_attention_mask"].tolist() == [expected]


def test_a_mask_and_labels_of_every_token_are_kept_and_padded(tokenizer):
    batch = GlobalAttentionCollator(tokenizer, pad_to_multiple_of=4)(
        [{"input_ids": [0, 7, 2], "global_attention_mask": [0, 1, 0], "labels": [1, 0, 1]}]
    )
    assert batch["global_attention_mask"].tolist() == [[0, 1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 0, 1, -100]]


WHOLE = {
    "regression": (0.25, torch.float32),
    "multi-label": ([1.0, 0.0, 1.0], torch.float32),
    "multi-label in whole numbers": ([1, 0], torch.int64),
}


@pytest.mark.parametrize("label, dtype", WHOLE.values(), ids=WHOLE)
def test_labels_of_every_kind(tokenizer, label, dtype):
    examples = [{"input_ids": [0, 7, 2], "labels": label}, {"input_ids": [0, 2], "labels": label}]
    batch = GlobalAttentionCollator(tokenizer)(examples)
    assert batch["labels"].tolist() == [label, label] and batch["labels"].dtype == dtype
    assert batch["global_attention_mask"].tolist() == [[1, 0, 0]] * 2


@pytest.mark.parametrize("with_labels", [True, False])
def test_multiple_choice(tokenizer, with_labels):
    choices = [[0, 7, 2, 2, 8, 2], [0, 7, 2, 2, 9, 9, 2]]
    example = {"input_ids": choices, "attention_mask": [[1] * 6, [1] * 7]}
    if with_labels:
        example["label"] = 1
    collator = GlobalAttentionCollator(tokenizer, global_tokens="after_separator")
    batch = collator([example, {**example, "input_ids": choices[::-1],
                                "attention_mask": [[1] * 7, [1] * 6]}])  # fmt: skip
    assert batch["input_ids"].shape == (2, 2, 7)
    assert batch["input_ids"][1, 1].tolist() == [0, 7, 2, 2, 8, 2, 1]
    assert batch["global_attention_mask"][0].tolist() == [[0, 0, 0, 0, 1, 1, 0], [0] * 4 + [1] * 3]
    assert batch["labels"].tolist() == [1, 1] if with_labels else "labels" not in batch
    with pytest.raises(ValueError, match="example 0 has the value -1"):
        collator([{**example, "input_ids": [[0, 7], [-1, 2]], "attention_mask": [[1, 1]] * 2}])


@pytest.mark.parametrize("side", ["right", "left"])
def test_collators_of_transformers_are_taken(tokenizer, monkeypatch, side):
    monkeypatch.setattr(tokenizer, "padding_side", side)
    tokens = [
        {"input_ids": [0, 7, 2], "labels": [5, 6, 5]},
        {"input_ids": [0, 2], "labels": [6, 6]},
    ]
    pad = DataCollatorForTokenClassification(tokenizer)
    batch = GlobalAttentionCollator(tokenizer, pad)(tokens)
    for name, expected in pad(tokens).items():
        assert torch.equal(batch[name], expected), name
    assert batch["global_attention_mask"].sum().item() == 2
    # The same without it.
    assert GlobalAttentionCollator(tokenizer)(tokens)["labels"].equal(batch["labels"])
    with torch.random.fork_rng():
        masked = GlobalAttentionCollator(tokenizer, DataCollatorForLanguageModeling(tokenizer))
        assert masked([{"input_ids": [0, 7, 2]}])["labels"].shape == (1, 3)


@pytest.mark.parametrize("side, moved", [("right", 0), ("left", 3)])
def test_the_slots_of_answers_move_with_their_tokens(tokenizer, monkeypatch, side, moved):
    monkeypatch.setattr(tokenizer, "padding_side", side)
    collator = GlobalAttentionCollator(tokenizer, global_tokens="question")
    short = {"input_ids": [0, 7, 2, 9], "start_positions": 3, "end_positions": 3}
    long = {"input_ids": [0, 7, 2, 8, 9, 5, 2], "start_positions": 3, "end_positions": 5}
    batch = collator([short, long])
    assert batch["start_positions"].tolist() == [3 + moved, 3]
    assert batch["end_positions"].tolist() == [3 + moved, 5]
    assert int(batch["input_ids"][0, 3 + moved]) == 9
    with pytest.raises(
        ValueError, match="end_positions of example 1 has the value 7, 0 <= value < its tokens = 7"
    ):
        collator([short, {**long, "end_positions": 7}])


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "the batch is empty"),
        ([{"input_ids": []}], "input_ids of example 0 has 0 tokens, 1 to max_length = 8"),
        ([{"input_ids": [0]}, {"input_ids": [0, 300]}], "example 1 has the value 300"),
        ([{"input_ids": [-1]}], "the value -1, 0 <= value < vocab_size = "),
        ([{"input_ids": [0] * 9}], "has 9 tokens, 1 to max_length = 8"),
        (
            [{"input_ids": [0], "label": 2}],
            "label of example 0 has the value 2, 0 <= value < num_labels = 2",
        ),
        ([{"input_ids": [0], "label": -1}], "label of example 0 has the value -1"),
        (
            [
                {"input_ids": [0, 5], "attention_mask": [1]},
                {"input_ids": [0], "attention_mask": [1]},
            ],
            "Unable to create tensor",
        ),
    ],
)
def test_bad_examples_are_named(tokenizer, examples, message):
    vocab_size = len(tokenizer)
    examples = [
        {**e, "input_ids": [vocab_size if i == 300 else i for i in e["input_ids"]]}
        for e in examples
    ]
    message = message.replace("300", str(vocab_size))
    with pytest.raises(ValueError, match=message):
        GlobalAttentionCollator(tokenizer, num_labels=2, max_length=8)(examples)


def test_bad_settings_are_named(tokenizer):
    with pytest.raises(ValueError, match="global_tokens is 'cls', allowed are 'none'"):
        GlobalAttentionCollator(tokenizer, global_tokens="cls")


def test_the_model_takes_the_batch_and_ignores_padding(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer))
    collator = GlobalAttentionCollator(tokenizer)
    short, long = ({"input_ids": [0, *range(5, n), 2]} for n in (20, 60))
    with torch.no_grad():
        alone = model(**collator([short])).last_hidden_state
        together = model(**collator([short, long])).last_hidden_state
    torch.testing.assert_close(together[:1, : alone.shape[1]], alone)
