"""The files that let Transformers find this package from a checkpoint alone."""

import os
from pathlib import Path

_HEADS = (
    "Model",
    "ForCausalLM",
    "ForMaskedLM",
    "ForMultipleChoice",
    "ForQuestionAnswering",
    "ForSequenceClassification",
    "ForTokenClassification",
)

# Model type -> configuration class, and Auto class -> model class.
_CLASSES = {
    "adaptive_sparse": (
        "AdaptiveSparseConfig",
        {f"AutoModel{head.removeprefix('Model')}": f"AdaptiveSparse{head}" for head in _HEADS},
    ),
    "adaptive_sparse_seq2seq": (
        "AdaptiveSparseSeq2SeqConfig",
        {
            "AutoModel": "AdaptiveSparseSeq2SeqModel",
            "AutoModelForSeq2SeqLM": "AdaptiveSparseForConditionalGeneration",
            "AutoModelForQuestionAnswering": "AdaptiveSparseSeq2SeqForQuestionAnswering",
            "AutoModelForSequenceClassification": "AdaptiveSparseSeq2SeqForSequenceClassification",
        },
    ),
}

_IMPORT = """try:
    from adaptive_longformer import {}
except ModuleNotFoundError as error:
    raise ImportError(
        "this model needs the package adaptive-longformer: `pip install .` in a clone of its "
        "source, as the model card says"
    ) from error
"""


def auto_map(model_type: str) -> dict[str, str]:
    """`auto_map` in config.json: Auto class -> file and class."""
    configuration, models = _CLASSES[model_type]
    return {"AutoConfig": f"configuration_{model_type}.{configuration}"} | {
        auto_class: f"modeling_{model_type}.{model}" for auto_class, model in models.items()
    }


def auto_class(architecture: str) -> str:
    """The Auto class that loads one of our model classes."""
    for _, models in _CLASSES.values():
        for auto, model in models.items():
            if model == architecture:
                return auto
    raise ValueError(f"architecture is {architecture!r}, a model class of this package is needed")


def remote_code_files(model_type: str) -> dict[str, str]:
    """File name -> content of the files that `auto_map` names.

    Imports only: a copy of the classes would be a second class with the same name. In a `try`, as
    Transformers would else tell to install whatever has the package's name on PyPI.
    """
    configuration, models = _CLASSES[model_type]
    names = {"configuration": configuration, "modeling": ", ".join(models.values())}
    return {f"{part}_{model_type}.py": _IMPORT.format(name) for part, name in names.items()}


def write_remote_code(folder: str | os.PathLike, model_type: str) -> None:
    """Write the files that `auto_map` in config.json names."""
    for name, content in remote_code_files(model_type).items():
        (Path(folder) / name).write_text(content, encoding="utf-8")
