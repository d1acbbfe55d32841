"""Fixtures that tests of several folders use."""

import pytest

from adaptive_longformer.attention.kernels import load as extension


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """A cache of its own and a small source that compiles in a moment."""
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu" / "answer.cpp").write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(extension, "SOURCES", tmp_path / "csrc")
    monkeypatch.setattr(extension, "_loaded", {})
    monkeypatch.setenv("ADAPTIVE_LONGFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ADAPTIVE_LONGFORMER_KERNELS", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path
