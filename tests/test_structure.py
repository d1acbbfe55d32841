"""How large the package is: a test, and `python tests/test_structure.py` prints the figures."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Few enough to be read: 17,000 are aimed at, and a change that needs more says what for.
MAX_LINES = 25_420
MAX_FILE_LINES = 700  # of all but the modeling files, which hold a model with all its heads
MAX_FUNCTION_LINES = 80
MAX_PARAMETERS = 12  # of all but the public operator, and `forward` as Transformers calls it
MAX_CONFIG_FIELDS = {"AdaptiveSparseConfig": 46, "AdaptiveSparseSeq2SeqConfig": 48}
MIN_SHARE_OF_RETURN_TYPES = 0.97

LARGE_FILES = ("modeling_adaptive_sparse.py", "modeling_adaptive_sparse_seq2seq.py")
LARGE_FILES += ("modeling_adaptive_sparse_causal.py",)
WIDE_FUNCTIONS = ("sparse_attention", "forward")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources() -> list[Path]:
    """The Python files that are installed; links inside the package lead to the other folders."""
    files = [ROOT / "adaptive_longformer_command_line.py"]
    for folder in ("adaptive_longformer", "configuration", "modeling"):
        links = [path for path in (ROOT / folder).iterdir() if path.is_symlink()]
        files += [
            path
            for path in sorted((ROOT / folder).rglob("*.py"))
            if not any(link in path.parents for link in links)
        ]
    return files


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources()}
FUNCTIONS = [
    (path, node)
    for path, tree in TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, Function)
]


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def place(path: Path, node: Function) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"


def num_lines() -> int:
    return sum(map(lines_of, TREES))


def long_files(limit: int = MAX_FILE_LINES) -> dict[str, int]:
    found = {str(path.relative_to(ROOT)): lines_of(path) for path in TREES}
    return {
        name: lines
        for name, lines in found.items()
        if lines > limit and Path(name).name not in LARGE_FILES
    }


def long_functions(limit: int = MAX_FUNCTION_LINES) -> dict[str, int]:
    """Functions by their lines, decorators and docstring included."""
    found = {}
    for path, node in FUNCTIONS:
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        assert node.end_lineno is not None
        found[place(path, node)] = node.end_lineno - first + 1
    return {name: lines for name, lines in found.items() if lines > limit}


def wide_signatures(limit: int = MAX_PARAMETERS) -> dict[str, int]:
    """Functions by their parameters, without self and cls."""
    found = {}
    for path, node in FUNCTIONS:
        names = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        count = sum(name.arg not in ("self", "cls", "ctx") for name in names)
        if node.name not in WIDE_FUNCTIONS:
            found[place(path, node)] = count
    return {name: count for name, count in found.items() if count > limit}


def config_fields() -> dict[str, int]:
    """How many fields each configuration has, those that they share included."""
    found = {
        node.name: sum(
            isinstance(entry, ast.AnnAssign) and "ClassVar" not in ast.unparse(entry.annotation)
            for entry in node.body
        )
        for tree in TREES.values()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config")
    }
    return {name: found[name] + found["AdaptiveSparseSharedConfig"] for name in MAX_CONFIG_FIELDS}


def share_of_return_types() -> float:
    """Of all but Triton's kernels, whose types are not Python's."""
    typed = [
        node.returns is not None
        for _, node in FUNCTIONS
        if not any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]
    return sum(typed) / len(typed)


def test_the_package_is_small():
    assert num_lines() <= MAX_LINES


def test_no_file_is_long():
    assert long_files() == {}


def test_no_function_is_long():
    assert long_functions() == {}


def test_no_signature_is_wide():
    assert wide_signatures() == {}


@pytest.mark.parametrize("name", MAX_CONFIG_FIELDS)
def test_configurations_have_few_fields(name):
    assert 0 < config_fields()[name] <= MAX_CONFIG_FIELDS[name]


def test_functions_say_what_they_return():
    assert share_of_return_types() >= MIN_SHARE_OF_RETURN_TYPES


def test_the_counts_count():
    """Every function of this kind would be found."""
    assert long_functions(0) and wide_signatures(-1) and long_files(0)
    assert 0.5 < share_of_return_types() <= 1
    assert len(FUNCTIONS) > 500


def _print_figures() -> None:
    print(f"{num_lines():,} lines in {len(TREES)} files (at most {MAX_LINES:,})")
    for folder in sorted({path.parent for path in TREES}):
        lines = sum(lines_of(path) for path in TREES if path.parent == folder)
        print(f"  {lines:>6,} {folder.relative_to(ROOT)}")
    for what, found, limit in (
        ("files", long_files(), MAX_FILE_LINES),
        ("functions", long_functions(), MAX_FUNCTION_LINES),
        ("signatures", wide_signatures(), MAX_PARAMETERS),
    ):
        print(f"{len(found)} {what} above {limit}")
        for name, size in sorted(found.items(), key=lambda item: -item[1]):
            print(f"  {size:>6,} {name}")
    largest = sorted(((lines_of(path), path) for path in TREES), reverse=True)[:5]
    print("longest files: " + ", ".join(f"{path.name} {lines}" for lines, path in largest))
    for name, count in config_fields().items():
        print(f"{name}: {count} fields (at most {MAX_CONFIG_FIELDS[name]})")
    share, least = share_of_return_types(), MIN_SHARE_OF_RETURN_TYPES
    print(f"{share:.1%} of {len(FUNCTIONS):,} functions have return types (at least {least:.0%})")


if __name__ == "__main__":
    _print_figures()
