"""Lets the built site show what the pages link to outside of docs, and the README as first page.

Links in the sources lead to files of the repository, so that they work where it is browsed. Here
they lead to the file's place in the site: a page of docs, or a copy below `repository/`.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the README, and copies of all files outside of docs that a page links to."""
    waiting = ["README.md", *(f"docs/{page.src_uri}" for page in files.documentation_pages())]
    seen = set(waiting)
    while waiting:
        name = waiting.pop()
        if name.endswith(".md"):
            text = (ROOT / name).read_text(encoding="utf-8")
            waiting += [target for target in _targets(name, text).values() if target not in seen]
            seen.update(waiting)
            content: str | bytes = _for_the_site(name, text)
        else:
            content = (ROOT / name).read_bytes()
        place = _place(name)
        if (old := files.get_file_from_path(place)) is not None:
            if not name.endswith(".md"):
                continue
            files.remove(old)
        files.append(File.generated(config, place, content=content))
    return files


def _place(name: str) -> str:
    """Where a file of the repository is in the site."""
    if name == "README.md":
        return "index.md"
    if name.startswith("docs/") and not name.startswith("docs/make/"):
        return name.removeprefix("docs/")
    return f"repository/{name}"


def _targets(name: str, text: str) -> dict[str, str]:
    """The links of a page to files of the repository, and these files."""
    folder = posixpath.dirname(name)
    paths = {link: posixpath.normpath(posixpath.join(folder, link)) for link in _LINK.findall(text)}
    return {link: path for link, path in paths.items() if (ROOT / path).is_file()}


def _for_the_site(name: str, text: str) -> str:
    targets = _targets(name, text)
    folder = posixpath.dirname(_place(name)) or "."

    def replace(match: re.Match) -> str:
        if match[1] not in targets:
            return match[1]
        return posixpath.relpath(_place(targets[match[1]]), folder)

    return _LINK.sub(replace, text)
