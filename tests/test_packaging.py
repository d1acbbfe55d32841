"""The shape of the package: what is installed, who may import whom, what an import costs."""

import ast
import graphlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "adaptive_longformer"
LINKED = ("configuration", "modeling")

# Imports go from higher to lower numbers. Equal numbers may import each other, without cycles.
# A module at the top of the package belongs here by its name; "" is the package itself.
LAYERS = {
    "patterns": 0,
    "progress_line": 0,
    "gpu": 0,
    "command_inputs": 0,
    "unfinished": 0,
    "attention": 1,
    "selection": 2,
    "baselines": 3,
    "configuration": 4,
    "modeling": 5,
    "conversion": 6,
    "training": 6,
    "analysis": 6,
    "inference": 6,
    "testing": 6,
    "": 7,
    "build_kernels": 8,
    "doctor": 8,
    "export": 8,
    "quickstart": 8,
    "__main__": 9,
}
PRINTING = {"build_kernels.py", "doctor.py", "quickstart.py"}
COMMAND_LINE = "adaptive_longformer_command_line"  # beside the package


def source_files() -> dict[str, Path]:
    """Every module of the package by its installed path, such as "modeling/attention_layer.py"."""
    folders = {"": PACKAGE, **{name: ROOT / name for name in LINKED}}
    return {
        str(Path(prefix) / path.relative_to(folder)): path
        for prefix, folder in folders.items()
        for path in sorted(folder.rglob("*.py"))
        if prefix or path.relative_to(folder).parts[0] not in LINKED
    }


FILES = source_files()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def part_of(name: str) -> str:
    """The layer that a file belongs to: "patterns/full.py" -> "patterns", "__init__.py" -> ""."""
    part = Path(name).parts[0].removesuffix(".py")
    return "" if part == "__init__" else part


def imported_parts(tree: ast.AST) -> set[str]:
    """The layers that a module imports, anywhere in its text."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "adaptive_longformer":
            # `from adaptive_longformer import x`: x is a layer, or a public name of the package.
            modules.update(
                f"adaptive_longformer.{alias.name}" if alias.name in LAYERS else node.module
                for alias in node.names
            )
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
    names = [module.split(".") for module in modules]
    return {name[1] if len(name) > 1 else "" for name in names if name[0] == "adaptive_longformer"}


def test_packages_list_is_complete():
    tomllib = pytest.importorskip("tomllib", reason="tomllib is in Python 3.11 and newer")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {str(Path("adaptive_longformer", name).parent) for name in FILES}
    assert sorted(settings["packages"]) == sorted(folder.replace("/", ".") for folder in folders)
    for package, folder in settings["package-dir"].items():
        assert package in settings["packages"]
        assert (ROOT / folder).is_dir()


def test_the_command_line_is_installed_too():
    tomllib = pytest.importorskip("tomllib", reason="tomllib is in Python 3.11 and newer")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["setuptools"]["py-modules"] == [COMMAND_LINE]
    assert (ROOT / f"{COMMAND_LINE}.py").is_file()
    for program in settings["project"]["scripts"].values():
        assert program == f"{COMMAND_LINE}:start"


@pytest.mark.parametrize("folder", sorted({Path(name).parent for name in FILES}))
def test_every_folder_is_a_package(folder):
    assert str(folder / "__init__.py") in FILES


@pytest.mark.parametrize("name", LINKED)
def test_links_lead_to_the_top_level_folders(name):
    link = PACKAGE / name
    if not link.is_symlink():
        pytest.skip(f"{link} is not a link: this checkout was made without symbolic links")
    assert link.resolve() == ROOT / name


def test_a_wheel_of_a_checkout_without_links_holds_modules_and_kernels(tmp_path):
    """Git writes a text file in place of a link where `core.symlinks` is off, as on Windows."""
    pytest.importorskip("build", reason="build is not installed: the extra dev has it")
    checkout = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("__pycache__", *LINKED)
    shutil.copytree(PACKAGE, checkout / PACKAGE.name, ignore=ignore)
    for name in LINKED:
        shutil.copytree(ROOT / name, checkout / name)
        (checkout / PACKAGE.name / name).write_text(f"../{name}")
    for name in ("pyproject.toml", "README.md", "LICENSE", f"{COMMAND_LINE}.py"):
        shutil.copy(ROOT / name, checkout)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path]
    run = subprocess.run([*command, checkout], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    found = set(zipfile.ZipFile(wheel).namelist())
    others = [path for path in (PACKAGE / "csrc").rglob("*") if path.is_file()]
    others += [PACKAGE / "py.typed", PACKAGE / "conversion" / "model_card.md"]
    names = {f"{PACKAGE.name}/{name}" for name in FILES}
    names |= {path.relative_to(ROOT).as_posix() for path in others}
    assert len(others) > 10 and names | {f"{COMMAND_LINE}.py"} <= found


@pytest.mark.parametrize("name", FILES)
def test_imports_go_one_way(name):
    part = part_of(name)
    assert part in LAYERS, f"{name}: say in LAYERS where {part!r} belongs"
    for imported in imported_parts(TREES[name]):
        assert imported in LAYERS, f"{name} imports adaptive_longformer.{imported}, not in LAYERS"
        assert LAYERS[imported] <= LAYERS[part], f"{name} imports adaptive_longformer.{imported}"


def test_layers_have_no_cycle():
    graph: dict[str, set[str]] = {}
    for name, tree in TREES.items():
        graph.setdefault(part_of(name), set()).update(imported_parts(tree) - {part_of(name)})
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the cycle


@pytest.mark.parametrize("name", FILES)
def test_imports_are_absolute(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"


def test_no_file_is_named_after_nothing():
    nothing = {"utils", "helpers", "misc", "common"}
    assert not [
        name for name in FILES if nothing & {part.removesuffix(".py") for part in Path(name).parts}
    ]


@pytest.mark.parametrize("name", sorted(set(FILES) - PRINTING))
def test_the_library_does_not_print(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"line {node.lineno}: use logging"


def test_import_loads_no_heavy_module():
    # Transformers itself may load some of them (scikit-learn, when it is installed).
    script = """
import sys
from transformers import AutoModel, GenerationMixin, PreTrainedModel
before = set(sys.modules)
import adaptive_longformer
heavy = ("torch.utils.cpp_extension", "datasets", "evaluate", "sklearn", "matplotlib", "peft")
heavy += ("triton",)
print(*[name for name in heavy if name in sys.modules and name not in before])
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == ""


def test_an_import_takes_little_more_than_that_of_transformers():
    script = """
import time, torch
from transformers import AutoModel, AutoTokenizer, GenerationMixin, PreTrainedModel, TrainerCallback
started = time.process_time()
import adaptive_longformer
print(time.process_time() - started)
"""
    # 0.2 s; twice that where no bytecode is kept and other processes are at work.
    for _ in range(3):
        run = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert run.returncode == 0, run.stderr
        if float(run.stdout) < 0.8:
            return
    pytest.fail(f"three imports took more than 0.8 s, the last one {run.stdout}")


def test_training_imports_without_what_only_reads_files_or_counts():
    script = """
import sys
sys.modules["datasets"] = sys.modules["sklearn"] = None
from adaptive_longformer.training import GlobalAttentionCollator, calibrate
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.returncode == 0, run.stderr
