"""Builds the CUDA kernels for the emulator, once per test session."""

import pytest
from emulation import build_emulator

from adaptive_longformer.testing import use_library


@pytest.fixture(scope="session")
def emulator_library(tmp_path_factory):
    return build_emulator(tmp_path_factory.mktemp("emulator"))


@pytest.fixture
def emulator(emulator_library):
    """Makes the emulator the library of the CUDA kernels: they then run on tensors of the CPU."""
    with use_library("cuda", emulator_library):
        yield emulator_library
