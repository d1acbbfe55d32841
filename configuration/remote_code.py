"""The two files that let Transformers find this package from a checkpoint alone."""

import os
from pathlib import Path

_CONFIGURATION = "configuration_adaptive_sparse"
_MODELING = "modeling_adaptive_sparse"
_HEADS = (
    "Model",
    "ForMaskedLM",
    "ForMultipleChoice",
    "ForQuestionAnswering",
    "ForSequenceClassification",
    "ForTokenClassification",
)

# Imports only: a copy of the classes would be a second class with the same name.
REMOTE_CODE_FILES = {
    f"{_CONFIGURATION}.py": (
        f"from adaptive_longformer.configuration.{_CONFIGURATION} import AdaptiveSparseConfig\n"
    ),
    f"{_MODELING}.py": (
        f"from adaptive_longformer.modeling.{_MODELING} import "
        f"{', '.join('AdaptiveSparse' + head for head in _HEADS)}\n"
        f"from adaptive_longformer.modeling.{_MODELING}_causal import AdaptiveSparseForCausalLM\n"
    ),
}

# For `auto_map` in config.json.
AUTO_MAP = {"AutoConfig": f"{_CONFIGURATION}.AdaptiveSparseConfig"} | {
    f"AutoModel{head.removeprefix('Model')}": f"{_MODELING}.AdaptiveSparse{head}"
    for head in (*_HEADS, "ForCausalLM")
}


def write_remote_code(folder: str | os.PathLike) -> None:
    """Write the files that `auto_map` in config.json names."""
    for name, content in REMOTE_CODE_FILES.items():
        (Path(folder) / name).write_text(content, encoding="utf-8")
