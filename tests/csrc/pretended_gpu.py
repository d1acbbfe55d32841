"""A GPU that is pretended: tensors that say they are on "cuda" and are computed on the CPU.

What code gets wrong only on a GPU shows on them: an operation on tensors of two devices, a mask
made on the CPU, a NumPy view. The CUDA kernels run in the emulator, at the addresses of the CPU.
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

# What autocast computes in its own type on a GPU: the most frequent of these functions.
_CAST = ("linear", "matmul", "__matmul__", "bmm", "baddbmm", "scaled_dot_product_attention")


class GpuTensor(torch.Tensor):
    """A tensor that says it is on the GPU, and whose elements are those of a tensor of the CPU."""

    elements: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elements: torch.Tensor) -> "GpuTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, elements.shape, strides=elements.stride(), dtype=elements.dtype, device=_INSIDE,
            storage_offset=elements.storage_offset(), requires_grad=False,
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
        if torch.is_autocast_enabled("cuda") and name in _CAST:
            args, kwargs = tree_map(_autocast, (args, kwargs))
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
        RuntimeError: as torch says of a real GPU, an operation gets tensors of two devices, or is
            one that torch.use_deterministic_algorithms refuses there.
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
        leaves, structure = tree_flatten((args, kwargs))
        on_gpu = [leaf for leaf in leaves if isinstance(leaf, GpuTensor)]
        if kwargs.get("device") is not None:
            gives_gpu = kwargs["device"] == _INSIDE
        else:
            gives_gpu = bool(on_gpu)
            _check_devices(function, args, leaves)
        is_refused = function._schema.name == "aten::cumsum" and args[0].is_floating_point()
        if gives_gpu and is_refused and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("cumsum_cuda_kernel has no deterministic implementation")
        args, kwargs = tree_unflatten([_on_cpu(leaf) for leaf in leaves], structure)
        result = function(*args, **kwargs)
        if not gives_gpu:
            return result
        known = {id(tensor.elements): tensor for tensor in on_gpu}

        def wrapped(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            # What was changed in place stays the same tensor.
            return known[id(value)] if id(value) in known else GpuTensor(value)

        return tree_map(wrapped, result)


def _check_devices(function: Any, args: tuple, leaves: list) -> None:
    """Raises if tensors are on two devices; a number of the CPU may take part, and an index."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    strangers = [tensor for tensor in tensors if not isinstance(tensor, GpuTensor)]
    name = function._schema.name.removeprefix("aten::")
    if len(strangers) in (0, len(tensors)) or name == "copy_":
        return
    is_index = name in ("index", "index_put", "index_put_") and isinstance(args[0], GpuTensor)
    if is_index or (name != "cat" and all(tensor.dim() == 0 for tensor in strangers)):
        return
    raise RuntimeError(
        f"Expected all tensors to be on the same device: {function} of tensors on cuda:0 and cpu, "
        f"of shapes {[tuple(tensor.shape) for tensor in tensors]}"
    )


def _on_cpu(value: Any) -> Any:
    """The elements of a tensor of the GPU; the CPU in place of a device."""
    if isinstance(value, GpuTensor):
        return value.elements
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _autocast(value: Any) -> Any:
    """A tensor of the GPU in the type of autocast, if it is one of numbers."""
    if isinstance(value, GpuTensor) and value.is_floating_point():
        return value.to(torch.get_autocast_dtype("cuda"))
    return value


def _inside(value: Any) -> Any:
    """A device or its name, if it is the GPU, as the one that torch does not ask for anything."""
    if isinstance(value, torch.device):
        return _INSIDE if value.type == "cuda" else value
    if isinstance(value, str) and value.split(":")[0] == "cuda":
        return _INSIDE
    return value
