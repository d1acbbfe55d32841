"""The comparison with full attention: where every key is read nothing differs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel, BertTokenizerFast, set_seed

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "fidelity.py"


@pytest.mark.slow
def test_more_keys_come_nearer_and_all_keys_are_full_attention(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(chr(97 + i) * 2 for i in range(20))]
    source = tmp_path / "bert"
    source.mkdir()
    (source / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(source / "vocab.txt")).save_pretrained(source)
    set_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, initializer_range=0.5,
        )
    ).save_pretrained(source)  # fmt: skip
    documents = tmp_path / "documents.jsonl"
    # The second is no longer than the widest window to either side.
    texts = [" ".join(words[4 + (i * i + 7 * i) % 20] for i in range(n)) for n in (1000, 200)]
    documents.write_text("".join(json.dumps({"document": text}) + "\n" for text in texts))
    for count in (1, 2):
        subprocess.run(
            [
                sys.executable, str(SCRIPT), "--model", str(source), "--data-file", str(documents),
                "--length", "1024", "--documents", "1", "--results", str(tmp_path / str(count)),
                "--allow-dirty", "--no-oracle", "--keys", "256", "1024",
            ],
            check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        documents.write_text(documents.read_text().splitlines()[-1])
    for table in ("repeated", "averaged"):
        check_rows(tmp_path, table)


def check_rows(tmp_path, table):
    long, short = (
        {
            row["name"]: row
            for row in json.loads((tmp_path / str(count) / "fidelity_1024.json").read_text())[
                "rows"
            ]
            if row["table"] == table
        }
        for count in (1, 2)
    )
    assert long["window of 256"]["error"] > long["window of 1024"]["error"] > 1e-3
    assert long["adaptive, 256 keys"]["error"] > 1e-3
    assert short["window of 1024"]["error"] < 1e-5
    assert short["adaptive, 1024 keys"]["error"] < 1e-5
    assert short["adaptive, sampled, 1024 keys"]["error"] < 1e-5
    assert short["window of 1024"]["cosine"] == pytest.approx(1.0)
    assert short["window of 256"]["error"] > 1e-3
