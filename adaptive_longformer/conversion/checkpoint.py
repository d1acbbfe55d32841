"""Reading the tensors of a checkpoint folder one at a time, and writing them again."""

import errno
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TORCH_WEIGHTS = "pytorch_model.bin"
TORCH_WEIGHTS_INDEX = "pytorch_model.bin.index.json"
MAX_SHARD_SIZE = 5 * 1000**3

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Checkpoint:
    """The tensors of one checkpoint folder: safetensors or .bin, whole or in shards.

    Opening reads headers only (a .bin of the old, non-zip format is the exception); `load` reads
    one tensor. Raises FileNotFoundError or ValueError, naming the file, if a file is missing or
    damaged.
    """

    def __init__(self, folder: Path, files: list[Path] | None = None):
        self._loaders: dict[str, Callable[[], torch.Tensor]] = {}
        self.tensors: dict[str, torch.Tensor] = {}  # on the meta device: shape and dtype
        for file in _weight_files(folder) if files is None else files:
            if file.suffix == ".safetensors":
                self._open_safetensors(file)
            else:
                self._open_torch(file)
        if not self.tensors:
            raise ValueError(f"source: the weight files of {folder} hold no tensors")

    def load(self, name: str) -> torch.Tensor:
        """Read one tensor into memory."""
        return self._loaders[name]()

    def equal(self, first: str, second: str) -> bool:
        """Tell whether two tensors hold the same dtype, shape and values."""
        one, other = self.tensors[first], self.tensors[second]
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        return torch.equal(self.load(first), self.load(second))

    def _open_safetensors(self, file: Path) -> None:
        with _readable(file):
            # The handle stays open: every loader of this file reads through it.
            handle = safe_open(file, framework="pt")
            for name in handle.keys():  # noqa: SIM118 (a handle is not a dict)
                view = handle.get_slice(name)
                dtype = _DTYPES.get(view.get_dtype())
                if dtype is None:
                    raise ValueError(
                        f"source: tensor {name} in {file.name} has dtype {view.get_dtype()}; "
                        f"supported are {', '.join(_DTYPES)}"
                    )
                self.tensors[name] = torch.empty(view.get_shape(), dtype=dtype, device="meta")
                self._loaders[name] = lambda name=name: handle.get_tensor(name)

    def _open_torch(self, file: Path) -> None:
        with _readable(file):
            content = torch.load(
                file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None
            )
        if not isinstance(content, dict):
            raise ValueError(f"source: {file} holds a {type(content).__name__}, not named tensors")
        for name, tensor in content.items():
            if isinstance(tensor, torch.Tensor):
                self.tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                self._loaders[name] = lambda tensor=tensor: tensor.detach().clone()


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; raise ValueError naming the file if it is damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"source: {file} is not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"source: {file} holds a {type(content).__name__}, not a JSON object")
    return content


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON object as Transformers writes its own."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def size_in_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return how much room tensors take in a file."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def write_weights(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    load: Callable[[str], torch.Tensor],
    progress: Callable[[str, int, int], None],
) -> None:
    """Write safetensors files, in shards above 5 GB; no more than one shard is in memory.

    Args:
        tensors: name -> tensor on the meta device (shape and dtype).
        load: gives the tensor to be written under a name.
    """
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=MAX_SHARD_SIZE)
    total, done = size_in_bytes(tensors.values()), 0
    for filename, names in split.filename_to_tensors.items():
        shard: dict[str, torch.Tensor] = {}
        storages: set[int] = set()
        for name in names:
            tensor = load(name).contiguous()
            storage = tensor.untyped_storage().data_ptr()
            # A source may have stored one tensor under two names; a file wants two of them then.
            shard[name] = tensor.clone() if storage in storages else tensor
            storages.add(storage)
            done += size_in_bytes([shard[name]])
            progress("weights", done, total)
        save_tensors(folder / filename, shard)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / WEIGHTS_INDEX, index)


def save_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write one safetensors file; raise OSError if the disk is full."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        if "os error 28" in str(error):
            raise disk_full(file.parent, size_in_bytes(tensors.values())) from error
        raise OSError(f"target: could not write {file} ({error})") from error


def check_room(folder: Path, needed: int) -> None:
    """Raise OSError if the disk that holds a folder has no room for `needed` bytes."""
    if shutil.disk_usage(folder).free < needed:
        raise disk_full(folder, needed)


def disk_full(folder: Path, needed: int) -> OSError:
    """Return the error that says how much room there is and how much is needed."""
    free = shutil.disk_usage(folder).free
    message = f"target: no room on the disk: {needed} bytes needed, {free} free"
    return OSError(errno.ENOSPC, message)


def _weight_files(folder: Path) -> list[Path]:
    for whole, index in ((WEIGHTS, WEIGHTS_INDEX), (TORCH_WEIGHTS, TORCH_WEIGHTS_INDEX)):
        if (folder / whole).is_file():
            return [folder / whole]
        if (folder / index).is_file():
            return _shards(folder / index)
    raise FileNotFoundError(
        f"source: {folder} holds no weights: expected {WEIGHTS}, {WEIGHTS_INDEX}, "
        f"{TORCH_WEIGHTS} or {TORCH_WEIGHTS_INDEX}"
    )


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"source: {index} has no weight_map")
    files = [index.parent / name for name in dict.fromkeys(weight_map.values())]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"source: {file} is missing, but {index.name} names it")
    return files


@contextmanager
def _readable(file: Path):
    """Turn what a damaged file raises into one line that names it."""
    try:
        yield
    except (
        SafetensorError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        EOFError,
        RuntimeError,
        UnicodeDecodeError,
        KeyError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"source: {file} is truncated or damaged, or holds more than tensors ({reason})"
        ) from error
