"""The documentation builds without a warning and without the network, and shows what it says."""

import os
import re
import runpy
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from doc_pages import ROOT

import adaptive_longformer

MAKE = ROOT / "docs" / "make"
# What makes a browser load something from another place.
LOADED = re.compile(
    r"""(?:<(?:script|img|iframe|source|embed)\b[^>]*\bsrc|<link\b[^>]*\bhref)=["']?(?:https?:)?//[^>]*"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: the extra docs has it")
    folder = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return folder


def test_pages_load_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        found = [
            tag
            for tag in LOADED.findall(page.read_text(encoding="utf-8"))
            if "canonical" not in tag
        ]
        assert not found, f"{page.name}: {found}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", sheet.read_text())


def test_every_public_name_has_its_place_in_the_reference(site):
    reference = "".join(page.read_text() for page in (site / "api").glob("*.html"))
    for name in adaptive_longformer.__all__:
        assert f'id="adaptive_longformer.{name}"' in reference, name


@pytest.mark.parametrize("name", runpy.run_path(str(MAKE / "pictures.py"))["ALL"])
def test_pictures_are_what_the_results_say(name):
    drawn = runpy.run_path(str(MAKE / "pictures.py"))["ALL"][name]()
    ElementTree.fromstring(drawn)
    committed = ROOT / "docs" / "pictures" / f"{name}.svg"
    assert committed.read_text(encoding="utf-8") == drawn, "make docs-data draws it anew"


def test_tables_are_what_the_results_say():
    tables = runpy.run_path(str(MAKE / "tables.py"))
    page = tables["PAGE"].read_text(encoding="utf-8")
    assert tables["with_tables"](page) == page, "make docs-data writes them anew"
    assert {name for name in tables["TABLES"] if f"<!-- table {name} -->" in page} == set(
        tables["TABLES"]
    )
