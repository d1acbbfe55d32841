"""A checkpoint of any family we know, as one of ours, for scripts that fine-tune."""

from pathlib import Path

from accelerate import PartialState
from transformers import AutoConfig

from adaptive_longformer.conversion.convert import convert_checkpoint
from adaptive_longformer.conversion.families import FAMILIES
from adaptive_longformer.conversion.source import check_family

_OUR_MODEL_TYPES = ("adaptive_sparse", "adaptive_sparse_seq2seq")


def take_over_checkpoint(model: str, target: Path, max_length: int) -> str:
    """The model itself if it is one of ours, otherwise the folder of its conversion.

    In a launch of several processes one converts and the others wait. A conversion that is there
    already is replaced: it may be of another model, or for shorter documents. One line on the
    terminal says where it is.

    Args:
        model: checkpoint folder or hub id.
        target: folder for the conversion.
        max_length: tokens that the result shall read; the position table is extended if needed.

    Raises:
        ValueError: the model is of a family that cannot be converted.
    """
    config = AutoConfig.from_pretrained(model)
    if config.model_type in _OUR_MODEL_TYPES:
        return model
    check_family(config.model_type, FAMILIES)
    rows = getattr(config, "max_encoder_position_embeddings", None)
    rows = rows or config.max_position_embeddings
    state = PartialState()
    with state.main_process_first():
        # Where the disks are not shared, the first process has not converted for all.
        if state.is_main_process or not target.exists():
            max_positions = None if max_length <= rows else max_length
            convert_checkpoint(model, target, max_positions=max_positions, overwrite=True)
    state.print(f"{model} converted to {target}", flush=True)
    return str(target)
