"""Loads machine code into a GPU and launches its kernels, by the driver's library."""

import ctypes
from typing import Any

from adaptive_longformer.attention.kernels.cache import KernelsUnavailableError
from adaptive_longformer.attention.kernels.cuda_launches import Launch

LIBRARY = "libcuda.so.1"
# CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, and what is allowed without it.
_MAX_SHARED_MEMORY = 8
_ALWAYS_ALLOWED = 48 * 1024


class CudaDriver:
    """The loaded driver; what it refuses is a RuntimeError with what it says.

    Raises:
        KernelsUnavailableError: there is none.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise KernelsUnavailableError(f"no CUDA driver: {error}") from error

    def ensure_context(self, device: int) -> None:
        """Gives this thread the context that torch uses on the current device, whose index is
        `device`, if it has none, as a thread of autograd may.
        """
        library, context = self._library, ctypes.c_void_p()
        self._check(library.cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
        if context.value is None:
            retained = library.cuDevicePrimaryCtxRetain(ctypes.byref(context), ctypes.c_int(device))
            self._check(retained, "cuDevicePrimaryCtxRetain")
            self._check(library.cuCtxSetCurrent(context), "cuCtxSetCurrent")

    def load(self, cubin: bytes) -> ctypes.c_void_p:
        """Machine code as a module of the current device; it stays there for the process."""
        module = ctypes.c_void_p()
        self._check(self._library.cuModuleLoadData(ctypes.byref(module), cubin), "cuModuleLoadData")
        return module

    def size_of(self, module: ctypes.c_void_p, variable: str) -> int:
        """The bytes of a variable of a module."""
        address, size = ctypes.c_void_p(), ctypes.c_size_t()
        found = self._library.cuModuleGetGlobal_v2(
            ctypes.byref(address), ctypes.byref(size), module, variable.encode()
        )
        self._check(found, variable)
        return size.value

    def function(self, module: ctypes.c_void_p, name: str, shared_memory: int) -> ctypes.c_void_p:
        """A kernel of a module, allowed to use so many bytes of shared memory."""
        function = ctypes.c_void_p()
        found = self._library.cuModuleGetFunction(ctypes.byref(function), module, name.encode())
        self._check(found, name)
        if shared_memory > _ALWAYS_ALLOWED:
            self._check(
                self._library.cuFuncSetAttribute(
                    function, ctypes.c_int(_MAX_SHARED_MEMORY), ctypes.c_int(shared_memory)
                ),
                f"{shared_memory} bytes of shared memory for {name}",
            )
        return function

    def launch(
        self, function: ctypes.c_void_p, launch: Launch, arguments: Any, stream: int
    ) -> None:
        """Launches a kernel whose only parameter is the struct `arguments`."""
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        error = self._library.cuLaunchKernel(
            function, ctypes.c_uint(launch.grid_x), ctypes.c_uint(launch.grid_y),
            ctypes.c_uint(launch.grid_z), ctypes.c_uint(launch.threads), ctypes.c_uint(1),
            ctypes.c_uint(1), ctypes.c_uint(launch.shared_memory), ctypes.c_void_p(stream),
            parameters, None,
        )  # fmt: skip
        self._check(error, f"the CUDA kernel {launch.name}")

    def _check(self, error: int, what: str) -> None:
        if error == 0:
            return
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(error, ctypes.byref(text))
        reason = text.value.decode() if text.value is not None else f"error {error}"
        raise RuntimeError(f"{what} failed: {reason}")
