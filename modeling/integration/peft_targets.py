"""The layers that PEFT's LoRA adapts when the user names none, without importing PEFT."""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_MODULE = "peft.utils.constants"
_TARGETS = {
    "adaptive_sparse": ["query", "value"],
    "adaptive_sparse_seq2seq": ["query", "value"],
}


def register_peft_targets() -> None:
    """Adds our entries to PEFT's table: now if PEFT is imported, otherwise as soon as it is."""
    if _MODULE in sys.modules:
        _add_targets(sys.modules[_MODULE])
    elif not any(isinstance(finder, _ConstantsFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ConstantsFinder())


def _add_targets(constants: ModuleType) -> None:
    constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.update(_TARGETS)


class _ConstantsFinder(MetaPathFinder):
    """Lets the table's module be imported as usual and adds our entries at the end."""

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ConstantsLoader(spec.loader)
        return spec


class _ConstantsLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _add_targets(module)

    def __getattr__(self, name: str):
        return getattr(self.loader, name)  # get_source and the like
