"""What would be launched on a GPU, without one."""

import collections
import contextlib
import math

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators of torch that are several kernels on a GPU, about.
_SEVERAL = {"sort": 6, "argsort": 6, "topk": 4, "cumsum": 2}
_NAMESPACE = "adaptive_longformer::"


class _Counter(TorchDispatchMode):
    """Counts operators that write something; the inside of ours in their place."""

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name.startswith(_NAMESPACE):
            with self:
                return OPDEFS[name]._init_fn(*args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        name = name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        is_new = not (function.is_view or "empty" in name or name in ("detach", "_unsafe_view"))
        if is_new and any(math.prod(tensor.shape) for tensor in tensors):
            self.counts[name] += _SEVERAL.get(name, 1)
        return result


@contextlib.contextmanager
def launches():
    """Inside, tensors on the device "meta" go where those on a GPU do, and kernels do not run.

    Yields:
        A Counter of launches by the name of the operator of torch or the kernel in Triton. What
        would read a number back from the device raises, as these tensors hold none.
    """
    from triton.runtime.jit import JITFunction

    counts = collections.Counter()

    def count(self, *arguments, **options):
        counts[self.fn.__name__] += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", count)
        patch.setattr(torch.cuda, "device_of", contextlib.nullcontext)
        patch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        for module in ("exact", "head_weights", "lists", "select_blocks"):
            name = f"adaptive_longformer.selection.{module}.why_no_triton"
            patch.setattr(name, lambda device: None)
        with _Counter(counts):
            yield counts
