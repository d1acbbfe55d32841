"""The pages of the documentation, and what in them can be run."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "model_cards" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
# Fences that hold nothing to run.
PROSE = ("text", "json", "toml")
COMMANDS = ("adaptive-longformer", "python", "make", "pip", "accelerate")

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<code>.*?)^(?P=indent)```$", re.M | re.S
)
_NOT_RUN = re.compile(r"<!-- not run: (?P<reason>[^>]+?) -->\s*\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        language: what stands behind the fence.
        code: its text.
        line: the line of the page on which the code begins, from 1.
        not_run: why the block is not run, from a comment just above it; None: it is.
    """

    language: str
    code: str
    line: int
    not_run: str | None


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, from top to bottom."""
    text = page.read_text(encoding="utf-8")
    blocks = []
    for match in _FENCE.finditer(text):
        reason = _NOT_RUN.search(text[: match.start()])
        code = re.sub(f"^{match['indent']}", "", match["code"], flags=re.M)
        line = text.count("\n", 0, match.start("code")) + 1
        blocks.append(Block(match["language"], code, line, reason and reason["reason"]))
    return blocks


def commands_of(block: Block) -> list[str]:
    """The command lines of a shell block, continued lines joined."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def inline_commands(page: Path) -> list[str]:
    """Commands that stand in the running text between backticks."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text))
    # One word is a name, not a command.
    return [span for span in spans if span.split()[0] in COMMANDS and " " in span]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))
