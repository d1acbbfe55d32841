"""The CUDA kernels as a library that nvcc built."""

import ctypes
from typing import Any

from adaptive_longformer.attention.kernels.cuda_launches import Launch


class CudaLibrary:
    """Launches kernels through the C interface of csrc/cuda/launch.cu.

    Args:
        library: the loaded library.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.adaptive_cuda_error.restype = ctypes.c_char_p

    def launch(self, launch: Launch, arguments: Any, device: int, stream: int) -> None:
        """Launches a kernel; the device is the current one.

        Raises:
            RuntimeError: with the kernel and what CUDA says.
        """
        assert self.library.adaptive_cuda_arguments_size() == ctypes.sizeof(arguments)
        error = self.library.adaptive_cuda_launch(
            ctypes.byref(launch), ctypes.byref(arguments), ctypes.c_void_p(stream)
        )
        if error != 0:
            text = self.library.adaptive_cuda_error(error).decode()
            raise RuntimeError(f"the CUDA kernel {launch.name} failed: {text}")
