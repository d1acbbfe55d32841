"""Commands in the docstrings of the examples and benchmarks can be pasted into a shell."""

import ast
import runpy
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py")])
# A server reads no data; tests/examples/test_serve.py starts it.
READ_DATA = [path for path in sorted(ROOT.glob("examples/*.py")) if path.stem != "serve"]


def commands(script: Path) -> list[list[str]]:
    """The words of every command: lines that are indented, joined where they end in a backslash."""
    text = (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "") + "\n"
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("    ")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_docstring_shows_how_to_run_the_script(script):
    assert commands(script)
    for words in commands(script):
        path = str(script.relative_to(ROOT))
        assert words[: words.index(path)] in (["python"], ["accelerate", "launch"]), words


@pytest.mark.parametrize("script", READ_DATA, ids=lambda path: path.stem)
def test_its_arguments_are_understood(script):
    parse_arguments = runpy.run_path(str(script))["parse_arguments"]
    for words in commands(script):
        given = words[words.index(str(script.relative_to(ROOT))) + 1 :]
        found = parse_arguments(given)
        assert given and (found[0] if isinstance(found, tuple) else found).model


@pytest.mark.parametrize("script", READ_DATA, ids=lambda path: path.stem)
@pytest.mark.parametrize("content, words", [(None, "is no file"), ('{"text": 1}', "line 1 has no")])
def test_a_mistake_in_the_data_ends_with_one_line(script, content, words, tmp_path):
    data = tmp_path / "data.jsonl"
    if content is not None:
        data.write_text(content.replace("1", '1, "label": 1'))
    arguments = ["--model", "never-read", "--data-file", str(data), "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match=words) as stop:
        runpy.run_path(str(script))["main"]([*arguments, "--cpu"])
    assert str(data) in str(stop.value.code) and "\n" not in str(stop.value.code)


@pytest.mark.parametrize("script", sorted(ROOT.glob("benchmarks/*.py")), ids=lambda path: path.stem)
def test_its_options_exist(script):
    text = script.read_text(encoding="utf-8")
    if "add_results_arguments(" in text:
        text += (ROOT / "benchmarks/side_by_side/results.py").read_text(encoding="utf-8")
    for words in commands(script):
        for word in words:
            assert not word.startswith("--") or f'"{word}"' in text, word
