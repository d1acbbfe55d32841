"""A GPU that is pretended: tensors that say they are on "cuda" and are computed on the CPU.

What code gets wrong only on a GPU shows on them: an operation on tensors of two devices, a mask made
on the CPU, a NumPy view. The CUDA kernels run in the emulator, at the addresses of the CPU.
"""

from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

GPU = torch.device("cuda", 0)
# What torch itself takes the tensors for: it asks a device of this type for nothing.
_INSIDE = torch.device("meta")


class GpuTensor(torch.Tensor):
    """A tensor that says it is on the GPU, and whose elements are those of a tensor of the CPU."""

    elements: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elements: torch.Tensor) -> "GpuTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, elements.shape, strides=elements.stride(), storage_offset=elements.storage_offset(),
            dtype=elements.dtype, device=_INSIDE, requires_grad=False,
        )  # fmt: skip
        tensor.elements = elements
        return tensor

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    def data_ptr(self) -> int:
        return self.elements.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.elements.untyped_storage()

    def get_device(self) -> int:
        return 0

    def tolist(self) -> Any:
        return self.elements.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert a tensor of the GPU to numpy")

    def __repr__(self, *args, **kwargs) -> str:
        return f"GpuTensor({self.elements})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        with PretendedGpu():
            return function(*args, **(kwargs or {}))


class _Devices(TorchFunctionMode):
    """Replaces the device before torch looks for a GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.device:
            return function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        args, kwargs = tree_map(_inside, (list(args), dict(kwargs or {})))
        if name == "cuda":
            return args[0].to(_INSIDE)
        if name == "cpu":
            return args[0].to("cpu")
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") == _INSIDE:
            # These make their elements where no mode sees it.
            return function(*args, **{**kwargs, "device": "cpu"}).to(_INSIDE)
        return function(*args, **kwargs)


class PretendedGpu(TorchDispatchMode):
    """While entered, "cuda" is a device like any other.

    Raises:
        RuntimeError: an operation gets tensors of two devices, as torch says of a real GPU.
    """

    def __enter__(self):
        self._devices = _Devices()
        self._devices.__enter__()
        return super().__enter__()

    def __exit__(self, *reason):
        super().__exit__(*reason)
        self._devices.__exit__(*reason)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function.namespace == "adaptive_longformer":
            with self:
                return OPDEFS[function._schema.name]._init_fn(*args, **kwargs)
        name = function._schema.name.removeprefix("aten::")
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        on_gpu = [leaf for leaf in tensors if isinstance(leaf, GpuTensor)]
        gives_gpu = bool(on_gpu)
        if kwargs.get("device") is not None:
            gives_gpu = kwargs["device"] == _INSIDE
        elif on_gpu and name not in ("copy_", "_to_copy"):
            # torch lets a number of the CPU take part, and an index.
            strangers = [
                tensor
                for tensor in tensors
                if not isinstance(tensor, GpuTensor) and (tensor.dim() > 0 or name == "cat")
            ]
            if strangers and not (name in ("index", "index_put", "index_put_") and on_gpu[0] is args[0]):
                raise RuntimeError(
                    f"Expected all tensors to be on the same device: {function} of tensors on cuda:0 "
                    f"and cpu, of shapes {[tuple(tensor.shape) for tensor in tensors]}"
                )
        plain = [leaf.elements if isinstance(leaf, GpuTensor) else leaf for leaf in leaves]
        plain = [torch.device("cpu") if isinstance(leaf, torch.device) else leaf for leaf in plain]
        plain_args, plain_kwargs = tree_unflatten(plain, structure)
        result = function(*plain_args, **plain_kwargs)
        if not gives_gpu:
            return result
        known = {id(tensor.elements): tensor for tensor in on_gpu}

        def wrapped(value):
            if not isinstance(value, torch.Tensor):
                return value
            return known.get(id(value)) if id(value) in known else GpuTensor(value)

        return tree_map(wrapped, result)


def _inside(value: Any) -> Any:
    """A device or its name, if it is the GPU, as the one that torch does not ask for anything."""
    if isinstance(value, torch.device):
        return _INSIDE if value.type == "cuda" else value
    if isinstance(value, str) and value.split(":")[0] == "cuda":
        return _INSIDE
    return value
