"""Results say which commit they are of."""

import argparse
import importlib
import subprocess
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("side_by_side.results")


@pytest.fixture
def repository(tmp_path, results, monkeypatch):
    """A repository with one commit that the benchmarks believe to be theirs."""

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    if results.shutil.which("git") is None:
        pytest.skip("there is no git")
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    for file in (tmp_path / "code.py", folder / "old.json"):
        file.write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    monkeypatch.setattr(results, "REPOSITORY", tmp_path)
    return tmp_path


def folder_of(results, *words):
    parser = argparse.ArgumentParser()
    results.add_results_arguments(parser, "default")
    return results.results_folder(parser.parse_args(words))


def test_a_clean_tree_gives_its_commit(results, repository):
    (repository / "benchmarks" / "results" / "old.json").write_text("2")
    (repository / "notes.txt").write_text("of no commit")
    assert folder_of(results) == Path("default")
    assert folder_of(results, "--results", "other") == Path("other")
    commit = results.commit_of_the_tree()
    assert len(commit) >= 7 and set(commit) <= set("0123456789abcdef")


def test_a_tree_with_changes_is_refused_unless_told(results, repository):
    (repository / "code.py").write_text("2")
    assert results.commit_of_the_tree().endswith("-dirty")
    with pytest.raises(SystemExit, match=r"not committed.*--allow-dirty"):
        folder_of(results)
    assert folder_of(results, "--allow-dirty") == Path("default")


def test_a_tree_of_no_commit_is_refused_unless_told(results, monkeypatch, tmp_path):
    monkeypatch.setattr(results, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert results.commit_of_the_tree() == "unknown"
    with pytest.raises(SystemExit, match=r"no known commit.*--allow-dirty"):
        folder_of(results)
    assert folder_of(results, "--allow-dirty") == Path("default")


# The record of a session on a GPU is nobody's result yet, and names the commit, clean or not.
WRITERS = [path for path in sorted(BENCHMARKS.glob("*.py")) if path.stem != "gpu_session"]


@pytest.mark.parametrize("script", WRITERS, ids=lambda path: path.stem)
def test_every_benchmark_that_writes_results_asks_first(script):
    text = script.read_text(encoding="utf-8")
    assert '"--results"' not in text
    writes = any(word in text for word in ("write_json(", "write_text(", 'open("a")'))
    assert writes == ("results_folder(args)" in text) == ("add_results_arguments(" in text)
