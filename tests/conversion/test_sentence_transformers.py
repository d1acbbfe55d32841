"""A sentence-transformers folder that was converted is one again, for longer documents."""

import pytest
import torch
from checkpoints import write_source
from datasets import Dataset
from test_convert import bert_tokenizer

from adaptive_longformer.conversion.convert import convert_checkpoint

WHY = "needs sentence-transformers, which only developers install"
sentence_transformers = pytest.importorskip("sentence_transformers", reason=WHY)
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules", reason=WHY)
losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses", reason=WHY)
WORDS = [f"word{i}" for i in range(90)]
LENGTHS = (3, 40, 11, 1, 25)  # of the texts of one batch, in words


def texts(seed, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator))
        for length in lengths
    ]


@pytest.fixture(scope="module", params=["mean", "cls"])
def folders(request, tmp_path_factory):
    """A BERT with pooling and normalisation, and its conversion to 256 tokens."""
    folder = tmp_path_factory.mktemp("models")
    write_source(folder / "bert", "bert", "Model", max_position_embeddings=64)
    bert_tokenizer(folder / "bert")
    encoder = modules.Transformer(str(folder / "bert"))
    pooling = modules.Pooling(32, pooling_mode=request.param)
    parts = [encoder, pooling, modules.Normalize()]
    model = sentence_transformers.SentenceTransformer(modules=parts, device="cpu")
    model.save(str(folder / "source"))
    convert_checkpoint(folder / "source", folder / "target", max_positions=256)
    return folder


def load(folder):
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu")


def test_short_texts_have_the_same_embeddings_and_long_ones_are_read_whole(folders):
    source, target = load(folders / "source"), load(folders / "target")
    assert [type(part) for part in target] == [type(part) for part in source]
    expected, actual = (
        model.encode(texts(0), convert_to_tensor=True) for model in (source, target)
    )
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual.norm(dim=1), torch.ones(len(LENGTHS)))
    (start,) = texts(1, [100])
    ends = [f"{start} word7", f"{start} word8"]
    assert target.max_seq_length == 256
    assert torch.equal(*source.encode(ends, convert_to_tensor=True))  # cut at 64 tokens
    assert not torch.allclose(*target.encode(ends, convert_to_tensor=True), atol=1e-6)


def test_it_is_trained_saved_and_loaded(folders, tmp_path):
    model = load(folders / "target")
    before = model.encode(texts(2), convert_to_tensor=True)
    pairs = Dataset.from_dict({"anchor": texts(3, [5] * 4), "positive": texts(4, [90] * 4)})
    args = sentence_transformers.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model=model, args=args, train_dataset=pairs,
        loss=losses.MultipleNegativesRankingLoss(model),
    )  # fmt: skip
    trainer.train()
    after = model.encode(texts(2), convert_to_tensor=True)
    assert after.isfinite().all() and not torch.allclose(before, after, atol=1e-3)
    model.save(str(tmp_path / "saved"))
    again = load(tmp_path / "saved").encode(texts(2), convert_to_tensor=True)
    torch.testing.assert_close(again, after, atol=1e-6, rtol=1e-6)


def test_no_modules_are_invented(tmp_path):
    source = write_source(tmp_path / "bert", "bert", "Model", max_position_embeddings=64)
    convert_checkpoint(source, tmp_path / "target")
    assert not (tmp_path / "target" / "modules.json").exists()
