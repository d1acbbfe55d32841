"""What a conversion is going to write, decided before anything is written."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from adaptive_longformer.conversion.checkpoint import readable, size_in_bytes

# Beside the weights of a converted folder: how its source named its tensors, and the tensors that
# have no place in our model. Both only serve an exact way back.
NAMES_FILE = "source_names.json"
EXTRA_FILE = "source_extra_tensors.safetensors"


@dataclass
class Plan:
    """What a conversion is going to write.

    Attributes:
        source_model_type: the source's `model_type`.
        head: the head of both, such as "ForMaskedLM".
        source_class: the Transformers class of the source.
        target_class: the class that loads the result.
        config: the content of the result's config.json.
        tensors: the result's tensors, name -> tensor on the meta device.
        load: gives the tensor to be written under a name.
        extra: tensors that are carried along for the way back, and how to load them.
        names: the source's tensor names and ours, for the way back; None if there is none.
        exact_length: up to how many tokens both models see the same; None: for any length.
        complete: whether the source has all the weights of its head.
        model_max_length: the length limit for the tokenizer, None to leave it alone.
        is_resized: whether it is another one than the source's.
        generation: the content of generation_config.json, if the source has none.
        notes: what the user should know.
    """

    source_model_type: str
    head: str
    source_class: type
    target_class: Any
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    load: Callable[[str], torch.Tensor]
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    load_extra: Callable[[str], torch.Tensor] | None = None
    names: dict[str, Any] | None = None
    exact_length: int | None = None
    complete: bool = True
    model_max_length: int | None = None
    is_resized: bool = False
    generation: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """How much room the tensors take."""
        return size_in_bytes([*self.tensors.values(), *self.extra.values()])

    @property
    def num_parameters(self) -> int:
        """How many numbers the weights are."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def check_layers(config: Any, num_tensors: int) -> None:
    """Raise ValueError before a model of a million layers is built, which takes minutes."""
    for name in ("num_hidden_layers", "encoder_layers", "decoder_layers"):
        if (number := getattr(config, name, 0)) > num_tensors:
            raise ValueError(
                f"source: {name} is {number} in config.json, too many for {num_tensors} tensors"
            )


def check_against_model(
    model_class: type,
    config: Any,
    tensors: dict[str, torch.Tensor],
    prefix: str,
    source_name: Callable[[str], str],
) -> list[str]:
    """Compare planned tensors with the model that shall load them; return what the head lacks.

    Args:
        tensors: name -> tensor, base model names with `prefix` in front.
        source_name: how a tensor was called in the source, for error messages.

    Raises:
        ValueError: a tensor has another shape than config.json says, or the encoder is incomplete.
    """
    with readable("config.json"), torch.device("meta"):
        model = model_class(config)
    is_base = model.base_model is model
    missing = []
    for name, parameter in model.named_parameters():
        full_name = prefix + name if is_base else name
        found = tensors.get(full_name)
        if found is None:
            missing.append(full_name)
        elif found.shape != parameter.shape:
            raise ValueError(
                f"source: tensor {source_name(full_name)} has shape {list(found.shape)}, "
                f"but config.json describes {list(parameter.shape)}"
            )
    in_head = [name for name in missing if not name.startswith(prefix) or ".pooler." in name]
    in_encoder = [name for name in missing if name not in in_head]
    if in_encoder:
        more = f" and {len(in_encoder) - 1} more" if len(in_encoder) > 1 else ""
        raise ValueError(
            f"source: tensor {source_name(in_encoder[0])}{more} missing from the weight files, "
            "but config.json describes a model that needs it"
        )
    return in_head
