"""What Transformers' own tests expect: their markers, and warnings that are said."""

import pytest
from transformers.utils import logging

MARKERS = (
    "accelerate_tests",
    "bitsandbytes",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
)
MARKERS += ("generate", "order", "torch_compile_test")


def pytest_configure(config):
    for name in MARKERS:
        config.addinivalue_line("markers", f"{name}: of Transformers")


@pytest.fixture(autouse=True)
def _warnings_are_said():
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    yield
    logging.set_verbosity(before)
