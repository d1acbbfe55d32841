import importlib
import os
import re
import subprocess
import sys

import pytest
from transformers import LongformerConfig, LongformerForMaskedLM

import adaptive_longformer
from adaptive_longformer.conversion import command
from adaptive_longformer.conversion.families import FAMILIES
from adaptive_longformer.testing import randomize_all_parameters
from adaptive_longformer_command_line import COMMANDS, main


@pytest.fixture
def source(tmp_path):
    config = LongformerConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        attention_window=16,
        max_position_embeddings=130,
    )
    randomize_all_parameters(LongformerForMaskedLM(config)).save_pretrained(tmp_path / "source")
    return str(tmp_path / "source")


def test_convert_there_and_back(tmp_path, source, capsys):
    target, back = str(tmp_path / "target"), str(tmp_path / "back")
    assert main(["convert", source, target, "--verify", "--max-positions", "256"]) == 0
    output, progress = capsys.readouterr()
    difference = re.search(r"max \|logit difference\|: (\S+)", output)
    assert difference and float(difference[1]) < 1e-5
    assert "AdaptiveSparseForMaskedLM" in output and "parameters: " in output and "MB" in output
    assert "extended from 128 to 256 tokens" in output
    assert "weights: 100 %" in progress and "verifying: 100 %" in progress
    assert main(["convert", target, back, "--reverse"]) == 0
    assert "LongformerForMaskedLM" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["convert", "/no/where", "{target}"], ["source", "/no/where"]),
        (["convert", "{source}", "{source}"], ["target", "overlaps"]),
        (["convert", "{source}", "{target}", "--attention-window", "7"], ["attention_window", "7"]),
        (["convert", "{source}", "{target}", "--max-positions", "5"], ["max_positions", "131072"]),
        (["convert", "{source}", "{target}", "--max-positions", "many"], ["--max-positions"]),
        (["convert", "{source}"], ["TARGET"]),
        (["konvert"], ["konvert", "convert"]),
        ([], ["COMMAND"]),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, source, capsys, arguments, words):
    places = {"source": source, "target": str(tmp_path / "target")}
    try:
        code = main([argument.format(**places) for argument in arguments])
    except SystemExit as stop:  # argparse leaves this way
        code = stop.code
    output, error = capsys.readouterr()
    assert code == 2
    assert output == ""
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert not (tmp_path / "target").exists()


def test_existing_target_needs_overwrite(tmp_path, source, capsys):
    target = str(tmp_path / "target")
    assert main(["convert", source, target]) == 0
    assert main(["convert", source, target]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["convert", source, target, "--overwrite"]) == 0


def test_interrupt_is_130(monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "convert_checkpoint", interrupt)
    assert main(["convert", "source", "target"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_help_lists_all_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    for name in COMMANDS:
        assert name in output


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"]])
def test_help_names_every_family(arguments, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")  # no line breaks
    with pytest.raises(SystemExit):
        main(arguments)
    output = capsys.readouterr().out
    for family in FAMILIES.values():
        assert re.search(rf"[ ,]{family.name}[ ,]", output), family.name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_run(name):
    assert callable(importlib.import_module(COMMANDS[name].module).run)


def test_the_module_is_a_program(tmp_path, source):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "adaptive_longformer", *arguments],
            capture_output=True,
            text=True,
            env=dict(os.environ, HF_HUB_OFFLINE="1"),
            timeout=300,
        )

    version = run("--version")
    assert (version.returncode, version.stderr) == (0, "")
    assert version.stdout == f"adaptive-longformer {adaptive_longformer.__version__}\n"
    mistake = run("convert", source + "x", str(tmp_path / "t"))
    assert mistake.returncode == 2
    assert "Traceback" not in mistake.stderr
    assert "source" in mistake.stderr.splitlines()[-1]
