"""Builds the CUDA kernels for the emulator, once per test session."""

import pytest
from emulation import build_emulator

from adaptive_longformer.attention import extension


@pytest.fixture(scope="session")
def emulator_library(tmp_path_factory):
    return build_emulator(tmp_path_factory.mktemp("emulator"))


@pytest.fixture
def emulator(emulator_library, monkeypatch):
    """Makes the emulator the library of the CUDA kernels: they then run on tensors of the CPU."""
    monkeypatch.setattr(extension, "_loaded", {"cuda": emulator_library})
    return emulator_library
