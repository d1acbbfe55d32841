"""Transformers' own tests, from the source distribution of the release that is installed.

Wheels have no tests, and the source distribution not all of them: those of generation, of export
and of pipelines are missing, and test_generation.py stands for the first.
"""

import importlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import transformers

NAME = "transformers_tests"


class Nothing:
    """In the place of a class that the source distribution lacks."""


# What its tests import from files that it lacks.
MISSING = {
    "exporters.test_export": {"ExportTesterMixin": Nothing},
    "generation.test_utils": {"GenerationTesterMixin": Nothing},
    "utils.test_configuration_utils": {"config_common_kwargs": {}},
}


def load(*names: str) -> list[ModuleType]:
    """Imports files of the tests.

    Raises:
        OSError: they cannot be had here; the message says why.
    """
    _make_module(NAME).__path__ = [str(_folder())]
    for file, contents in MISSING.items():
        _make_module(f"{NAME}.{file.split('.')[0]}").__path__ = []
        vars(_make_module(f"{NAME}.{file}")).update(contents)
    try:
        return [importlib.import_module(f"{NAME}.{name}") for name in names]
    except ImportError as error:
        raise OSError(f"Transformers' tests cannot be imported: {error}") from error


def _make_module(name: str) -> ModuleType:
    return sys.modules.setdefault(name, ModuleType(name))


def _folder() -> Path:
    """The unpacked tests; fetched once per environment."""
    kept = Path(sys.prefix, "share", f"transformers-{transformers.__version__}-tests")
    if kept.is_dir():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        _fetch(Path(scratch))
        try:
            Path(scratch, "tests").rename(kept)
        except OSError:
            if not kept.is_dir():  # another process may have been faster
                raise
    return kept


def _fetch(scratch: Path) -> None:
    """Puts `tests` of the source distribution into a folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary=transformers", "--dest", str(scratch)]
    command += [f"transformers=={transformers.__version__}"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=120, text=True)
    except subprocess.SubprocessError as error:
        raise OSError(f"Transformers' source distribution cannot be had: {error}") from error
    scratch.joinpath("tests").mkdir()
    scratch.joinpath("tests", "__init__.py").touch()
    with tarfile.open(next(scratch.glob("*.tar.gz"))) as archive:
        for member in archive.getmembers():
            parts = Path(member.name).parts[1:]
            if member.isfile() and len(parts) == 2 and parts[0] == "tests":
                content = archive.extractfile(member)
                assert content is not None
                scratch.joinpath(*parts).write_bytes(content.read())
