import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from adaptive_longformer.training.small_longformer import (
    train_byte_level_tokenizer,
    write_small_longformer,
)


def test_tokenizer_gives_back_any_text_and_puts_special_tokens_around():
    tokenizer = train_byte_level_tokenizer(["def f(x):\n    return x"] * 5, vocab_size=300)
    text = "def naïve(x):\n\treturn 'ü' "
    ids = tokenizer(text)["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id) == (0, 2)
    assert tokenizer.decode(ids[1:-1]) == text
    assert tokenizer.pad_token_id == 1


def test_an_ordinary_checkpoint_is_written_without_touching_the_random_state(tmp_path):
    tokenizer = train_byte_level_tokenizer(["a b c"], vocab_size=300, max_length=512)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    for name in ("one", "two"):
        write_small_longformer(tmp_path / name, tokenizer, ["x", "y"], max_length=512, seed=7)
    assert torch.equal(torch.random.get_rng_state(), state)
    one, two = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        for name in ("one", "two")
    )
    assert one.config.model_type == "longformer"
    assert one.config.id2label == {0: "x", 1: "y"}
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "one")) == len(tokenizer)
