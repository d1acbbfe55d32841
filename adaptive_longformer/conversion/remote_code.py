"""The two files that let Transformers find this package from a checkpoint alone."""

from pathlib import Path

from adaptive_longformer.conversion.family import HEADS

_CONFIGURATION = "configuration_adaptive_sparse"
_MODELING = "modeling_adaptive_sparse"

# One line each: a copy of the classes would be a second class with the same name.
REMOTE_CODE_FILES = {
    f"{_CONFIGURATION}.py": (
        f"from adaptive_longformer.configuration.{_CONFIGURATION} import AdaptiveSparseConfig\n"
    ),
    f"{_MODELING}.py": (
        f"from adaptive_longformer.modeling.{_MODELING} import "
        + ", ".join(f"AdaptiveSparse{head}" for head in HEADS)
        + "\n"
    ),
}

AUTO_MAP = {
    "AutoConfig": f"{_CONFIGURATION}.AdaptiveSparseConfig",
    **{
        f"AutoModel{head.removeprefix('Model')}": f"{_MODELING}.AdaptiveSparse{head}"
        for head in HEADS
    },
}


def write_remote_code(folder: Path) -> None:
    """Write the files that `auto_map` in config.json names."""
    for name, content in REMOTE_CODE_FILES.items():
        (folder / name).write_text(content, encoding="utf-8")
