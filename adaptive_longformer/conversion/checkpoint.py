"""Reading the tensors of a checkpoint folder one at a time, and writing them again."""

import errno
import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TORCH_WEIGHTS = "pytorch_model.bin"
TORCH_WEIGHTS_INDEX = "pytorch_model.bin.index.json"
MAX_SHARD_SIZE = 5 * 1000**3

# A name goes into notes and model cards as it is.
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_.\-/]{1,500}")
_MAX_JSON_DEPTH = 64

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

# What readers raise for content of a wrong shape.
_DAMAGE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, RuntimeError, TypeError,
    ValueError, SafetensorError, StrictDataclassError, pickle.UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip


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
            if inside(file, folder).suffix == ".safetensors":
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
        with readable(file):
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
                meta = torch.empty(view.get_shape(), dtype=dtype, device="meta")
                self._add(file, name, meta, lambda name=name: handle.get_tensor(name))

    def _open_torch(self, file: Path) -> None:
        with readable(file):
            content = torch.load(
                file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None
            )
        if not isinstance(content, dict):
            raise ValueError(f"source: {file} holds a {type(content).__name__}, not named tensors")
        for name, tensor in content.items():
            if isinstance(tensor, torch.Tensor):
                meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                self._add(file, name, meta, lambda tensor=tensor: tensor.detach().clone())

    def _add(
        self, file: Path, name: str, meta: torch.Tensor, load: Callable[[], torch.Tensor]
    ) -> None:
        if not isinstance(name, str) or not _TENSOR_NAME.fullmatch(name):
            raise ValueError(
                f"source: {file} names a tensor {name!r:.80}; letters, digits and ._-/ are needed"
            )
        self.tensors[name], self._loaders[name] = meta, load


def inside(file: Path, root: Path | None = None) -> Path:
    """Return a file of a folder; raise ValueError if it is a link that leads out of the folder.

    In the Hub's cache files are links to `blobs` beside the folder: these are followed.
    """
    root, place = (root or file.parent).resolve(), file.resolve()
    homes = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(place.is_relative_to(home) for home in homes):
        raise ValueError(f"source: {file} is a link out of the folder; put the file itself there")
    return file


def read_json(file: Path, kind: type = dict, root: Path | None = None) -> Any:
    """Read a JSON object (or list); raise ValueError naming the file if it is damaged."""
    with readable(file):
        content = json.loads(inside(file, root).read_text(encoding="utf-8"))
        if not isinstance(content, kind):
            raise ValueError(f"a {type(content).__name__}, a JSON {kind.__name__} is needed")
        if _depth(content) > _MAX_JSON_DEPTH:
            raise ValueError(f"more than {_MAX_JSON_DEPTH} levels")
    return content


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


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
            files = [folder / name for name in shard_names(folder / index)]
            for file in files:
                if not file.is_file():
                    raise FileNotFoundError(f"source: {file} is missing, but {index} names it")
            return files
    raise FileNotFoundError(
        f"source: {folder} holds no weights: expected {WEIGHTS}, {WEIGHTS_INDEX}, "
        f"{TORCH_WEIGHTS} or {TORCH_WEIGHTS_INDEX}"
    )


def shard_names(index: Path) -> list[str]:
    """Return the names of the files, beside it, that an index of weights names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"source: {index} has no weight_map")
    for name in weight_map.values():
        if not is_plain_name(name):
            raise ValueError(f"source: {index} names {name!r:.80}, a file beside it is needed")
    return list(dict.fromkeys(weight_map.values()))


def is_plain_name(name: object) -> bool:
    """Tell whether this names something in a folder, and nothing above or below it."""
    return isinstance(name, str) and re.fullmatch(r"[\w\-][\w.\- ]{0,200}", name) is not None


@contextmanager
def readable(file: Path | str) -> Iterator[None]:
    """Turn what damaged content raises into one line that names its file."""
    try:
        yield
    except _DAMAGE as error:
        if str(error).startswith("source: "):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"source: {file} is truncated or damaged ({reason})") from error
