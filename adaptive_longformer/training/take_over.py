"""A checkpoint of any family we know, as one of ours, for scripts that fine-tune."""

from pathlib import Path

from accelerate import PartialState
from transformers import AutoConfig

from adaptive_longformer.conversion.convert import convert_checkpoint

_OUR_MODEL_TYPES = ("adaptive_sparse", "adaptive_sparse_seq2seq")


def take_over_checkpoint(model: str, target: Path, max_length: int) -> str:
    """The model itself if it is one of ours, otherwise the folder of its conversion.

    In a launch of several processes one converts and the others wait. A conversion that is there
    already is taken as it is. One line on the terminal says where it is.

    Args:
        model: checkpoint folder or hub id.
        target: folder for the conversion.
        max_length: tokens that the result shall read; the position table is extended if needed.
    """
    config = AutoConfig.from_pretrained(model)
    if config.model_type in _OUR_MODEL_TYPES:
        return model
    with PartialState().main_process_first():
        if not target.exists():
            rows = getattr(config, "max_encoder_position_embeddings", None)
            rows = rows or config.max_position_embeddings
            max_positions = None if max_length <= rows else max_length
            convert_checkpoint(model, target, max_positions=max_positions)
    PartialState().print(f"{model} converted to {target}", flush=True)
    return str(target)
