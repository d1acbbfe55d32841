"""Builds the CUDA kernels for the emulator, once per test session, and pretends to have a GPU."""

import contextlib
import time
from types import SimpleNamespace

import pytest
import torch
from emulation import build_emulator
from pretended_gpu import PretendedGpu

from adaptive_longformer.attention.backends import choose, compiled, cuda
from adaptive_longformer.testing import use_library


@pytest.fixture(scope="session")
def emulator_library(tmp_path_factory):
    return build_emulator(tmp_path_factory.mktemp("emulator"))


@pytest.fixture
def emulator(emulator_library):
    """Makes the emulator the library of the CUDA kernels: they then run on tensors of the CPU."""
    with use_library("cuda", emulator_library):
        yield emulator_library


class _Event:
    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def elapsed_time(self, end):
        return 1000 * (end.time - self.time)


@pytest.fixture
def gpu_machine(emulator, monkeypatch):
    """A machine with a pretended GPU that torch.cuda finds; a list of the kernels that ran."""
    properties = SimpleNamespace(major=9, minor=0, shared_memory_per_block_optin=232448)
    imitations = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "device_count": lambda: 1,
        "get_device_name": lambda device=None: "Pretended GPU",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device: properties,
        "is_current_stream_capturing": lambda: False,
        "current_stream": lambda device: SimpleNamespace(cuda_stream=0, synchronize=lambda: None),
        "device_of": lambda tensor: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 2**20,
        "max_memory_allocated": lambda: 3 * 2**20,
        "Event": _Event,
    }
    for name, imitation in imitations.items():
        monkeypatch.setattr(torch.cuda, name, imitation)
    # Short documents are for the kernels too, or nothing would be seen of them.
    monkeypatch.setattr(choose, "DENSE_CROSSOVER", {})
    launched, run = [], cuda._Call.run

    def counted(call, launches):
        launched.extend(launch.name for launch in launches)
        run(call, launches)

    monkeypatch.setattr(cuda._Call, "run", counted)
    caches = (compiled._check_cuda_kernel, cuda._pattern_lists)
    for cache in caches:
        cache.cache_clear()
    with PretendedGpu():
        yield launched
    for cache in caches:
        cache.cache_clear()
