"""What README and docs tell the reader to do works as it stands there.

A page is run from top to bottom in an empty folder, in which tiny checkpoints lie under the names
of those on the hub. A block below `<!-- not run: reason -->` is not run: its options are checked.
"""

import re

import pytest
import torch
from doc_commands import run, understand
from doc_pages import PAGES, PROSE, ROOT, blocks_of, commands_of, inline_commands, name_of
from doc_workplace import prepare

from adaptive_longformer import AdaptiveSparseConfig

# How many blocks of all pages are not run. A larger number needs a reason as good as a test.
NOT_RUN = 25


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_works_as_written(page, tmp_path, monkeypatch):
    # As in the new process that a reader starts: torch gives up to compile anew what other tests
    # have compiled often.
    torch.compiler.reset()
    blocks = blocks_of(page)
    prepare(tmp_path, page.read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks:
        where = f"{name_of(page)}:{block.line}"
        if block.language == "python":
            # A traceback then names the line of the page.
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            if block.not_run is None:
                exec(code, namespace)
        elif block.language == "bash":
            for command in commands_of(block):
                print(f"{where}: {command}")
                (run if block.not_run is None else understand)(command, monkeypatch)
        else:
            assert block.language in PROSE, f"{where}: a block of {block.language!r}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_the_text_are_understood(page, monkeypatch):
    for command in inline_commands(page):
        understand(command, monkeypatch)


def test_few_blocks_are_not_run():
    not_run = [
        f"{name_of(page)}:{block.line}: {block.not_run}"
        for page in PAGES
        for block in blocks_of(page)
        if block.not_run is not None
    ]
    print(*not_run, sep="\n")
    assert len(not_run) == NOT_RUN


def test_fields_in_the_table_of_knobs_exist():
    page = (ROOT / "docs" / "adaptive.md").read_text(encoding="utf-8")
    table = page.split("## The knobs")[1].split("\n\n")[1]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert len(names) > 5
    assert set(names) <= set(AdaptiveSparseConfig().to_dict())
