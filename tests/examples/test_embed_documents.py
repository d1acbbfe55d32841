import json
import runpy
from pathlib import Path

import pytest
import torch
from transformers import RobertaConfig, RobertaModel

from adaptive_longformer.testing import randomize_all_parameters
from adaptive_longformer.training.small_longformer import train_byte_level_tokenizer

sentence_transformers = pytest.importorskip(
    "sentence_transformers", reason="needs sentence-transformers, which only developers install"
)
SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "embed_documents.py"


def test_documents_longer_than_the_source_are_embedded_and_trained_on(tmp_path, capsys):
    example = runpy.run_path(str(SCRIPT))
    rows = [
        {"query": f"about {i} apples", "document": f"{'pear ' * 60} {i} apples"} for i in range(10)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = [text for row in rows for text in row.values()]
    tokenizer = train_byte_level_tokenizer(texts, vocab_size=300, max_length=32)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=34, type_vocab_size=1,
    )  # fmt: skip
    randomize_all_parameters(RobertaModel(config)).save_pretrained(tmp_path / "roberta")
    tokenizer.save_pretrained(tmp_path / "roberta")
    output = tmp_path / "output"
    result = example["main"](
        ["--model", str(tmp_path / "roberta"), "--data-file", str(tmp_path / "pairs.jsonl"),
         "--output", str(output), "--max-length", "128", "--batch-size", "4", "--cpu"]
    )  # fmt: skip
    assert json.loads((output / "result.json").read_text()) == result
    assert set(result) == {"found_first_before", "found_first"}
    embeddings = torch.load(output / "embeddings.pt")
    assert embeddings.shape == (10, 16)
    model = sentence_transformers.SentenceTransformer(str(output / "model"), device="cpu")
    again = model.encode([rows[3]["document"]], convert_to_tensor=True, normalize_embeddings=True)
    torch.testing.assert_close(again[0], embeddings[3], atol=1e-5, rtol=1e-5)
    # What comes after the 32 tokens of the source is read.
    assert not torch.allclose(embeddings[3], embeddings[4], atol=1e-5)


def test_the_own_document_has_to_be_the_most_similar():
    share_found_first = runpy.run_path(str(SCRIPT))["share_found_first"]
    same = torch.eye(4)
    assert share_found_first(same, same) == 1.0
    assert share_found_first(same, same[[1, 0, 2, 3]]) == 0.5
