"""Lets the built site show what the pages link to outside of docs, and the README as first page.

Links stay as they are on GitHub: `../benchmarks/results/x.json` works there, and here it becomes
`repository/benchmarks/results/x.json`, a copy of the file.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#]+)")
_COPIES = "repository"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    pages = {"index.md": readme}
    for file in files.documentation_pages():
        pages[file.src_uri] = Path(file.abs_src_path or "").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=_with_copies("index.md", readme)))
    wanted = {target for uri, text in pages.items() for target in _outside(uri, text).values()}
    for name in sorted(wanted):
        files.append(
            File.generated(config, f"{_COPIES}/{name}", content=(ROOT / name).read_bytes())
        )
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return (
        markdown if page.file.src_uri == "index.md" else _with_copies(page.file.src_uri, markdown)
    )


def _outside(uri: str, text: str) -> dict[str, str]:
    """Links of a page that lead to files of the repository outside of docs, by file."""
    # The README stands at the top, the other pages in docs.
    folder = "" if uri == "index.md" else posixpath.join("docs", posixpath.dirname(uri))
    found = {}
    for link in _LINK.findall(text):
        name = posixpath.normpath(posixpath.join(folder, link))
        is_page = uri == "index.md" and (ROOT / "docs" / name).is_file()
        is_docs = name.startswith("docs/") and not name.startswith("docs/make/")
        if not is_page and not is_docs and (ROOT / name).is_file():
            found[link] = name
    return found


def _with_copies(uri: str, text: str) -> str:
    outside = _outside(uri, text)
    up = "../" * uri.count("/")

    def replace(match: re.Match) -> str:
        name = outside.get(match[1])
        return match[1] if name is None else f"{up}{_COPIES}/{name}"

    return _LINK.sub(replace, text)
