"""What has to be right about tensors of a GPU that are made once and read by many calls."""

from typing import TypeVar

import torch

Cached = TypeVar("Cached")
_in_graphs: dict[int, object] = {}


def ready_for_every_stream(value: Cached, device: torch.device) -> Cached:
    """The value that a cache is about to take, when the device has nothing left to do: other
    streams may then read its tensors, and none still reads those that the cache drops for it.

    Args:
        value: just made.
        device: where its tensors are.

    Raises:
        RuntimeError: a CUDA graph is being captured, and nothing is made before its replay.
    """
    if device.type == "cuda" and not torch.compiler.is_compiling():
        torch.cuda.synchronize(device)
    return value


def kept_in_graphs(value: Cached, device: torch.device) -> Cached:
    """The value of a cache; while a CUDA graph is captured, one that is never freed.

    A graph reads tensors at their addresses, also when the cache has long dropped them.

    Args:
        value: as the cache gives it.
        device: where its tensors are.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _in_graphs[id(value)] = value
    return value
