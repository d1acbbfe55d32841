"""The markers of Transformers' own tests."""

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
