import pytest
from transformers import AutoConfig, BertConfig, BertModel, T5Config

from adaptive_longformer.training.take_over import take_over_checkpoint


@pytest.fixture
def bert(tmp_path):
    """Writes BERT checkpoints, which read 64 tokens."""

    def write(name, **sizes):
        config = BertConfig(
            vocab_size=60, hidden_size=16, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=64, **{"num_hidden_layers": 1, **sizes},
        )  # fmt: skip
        BertModel(config).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return write


def test_an_older_conversion_is_replaced(tmp_path, bert, capsys):
    target = tmp_path / "converted"
    assert take_over_checkpoint(bert("first"), target, 64) == str(target)
    take_over_checkpoint(bert("first"), target, 200)
    assert AutoConfig.from_pretrained(target).max_sequence_length == 200
    take_over_checkpoint(bert("second", num_hidden_layers=3), target, 64)
    config = AutoConfig.from_pretrained(target)
    assert config.num_hidden_layers == 3 and config.max_sequence_length == 64
    assert f"{tmp_path / 'second'} converted to {target}" in capsys.readouterr().out


def test_one_of_our_checkpoints_is_taken_as_it_is(tmp_path, bert):
    ours = take_over_checkpoint(bert("source"), tmp_path / "ours", 64)
    assert take_over_checkpoint(ours, tmp_path / "again", 64) == ours
    assert not (tmp_path / "again").exists()


def test_another_family_is_refused(tmp_path):
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="model_type 't5' cannot be converted"):
        take_over_checkpoint(str(tmp_path / "t5"), tmp_path / "converted", 64)
