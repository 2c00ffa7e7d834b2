"""Hooks of MkDocs: the pages are written for GitHub, and these make a site of them.

A link out of docs/, such as ../idlm/decoding/law.py, leads to the file on GitHub. The site has a
page under source/ for each file or folder that is linked to, so it needs no other server. What a
comment `<!-- site: .. -->` holds is on the site alone.

Paths are those of the repository, with "/". Places are those of the site's sources.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")
"""The path in a link to a file."""
ON_THE_SITE = re.compile(r"<!-- site: (.*?)\s*-->", re.DOTALL)
LANGUAGES = {
    **{".c": "c", ".cfg": "ini", ".h": "c", ".py": "python", ".service": "ini", ".sh": "sh"},
    **{".toml": "toml", ".yaml": "yaml", ".yml": "yaml"},
}
"""By the suffix of files that are shown as code. Others are part of the site as they are."""
FENCE = "~" * 12
HIDDEN = "---\nsearch: {exclude: true}\n---\n"
NOT_LISTED = ("__pycache__", ".")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the pages link to, and what those pages link to."""
    from mkdocs.structure.files import File, InclusionLevel

    listed = set(_names(config.nav))
    ours = {repository_path(file.src_uri) for file in files.documentation_pages()}
    for path in reached(ours | {repository_path(at) for at in listed}):
        if not path.startswith("docs/"):
            level = InclusionLevel.UNDEFINED if place(path) in listed else InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, place(path), inclusion=level, **content(path)))
    return files


def reached(paths: set[str]) -> set[str]:
    """Some files and folders, and all that links and folders lead to from there."""
    seen, waiting = set(paths), list(paths)
    while waiting:
        path = waiting.pop()
        new = set(listing(path))
        if path.endswith(".md") and (ROOT / path).is_file():
            new |= {target for _, target in links((ROOT / path).read_text(), path)}
        new = {one for one in new - seen if (ROOT / one).exists()}
        seen |= new
        waiting += new
    return seen


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Let the links of a page lead to places of the site."""
    return as_site(markdown, page.file.src_uri)


def as_site(markdown: str, at: str) -> str:
    """The text of the page `at` a place, as the site has it."""
    if Path(Path(at).stem).suffix in LANGUAGES:
        return markdown  # code
    here = posixpath.dirname(at)
    for written, path in links(markdown, repository_path(at)):
        if (ROOT / path).exists():
            relative = posixpath.relpath(place(path), here)
            markdown = markdown.replace(f"]({written})", f"]({relative})")
            markdown = markdown.replace(f"]({written}#", f"]({relative}#")
    return ON_THE_SITE.sub(lambda comment: comment[1], markdown)


def links(markdown: str, path: str) -> list[tuple[str, str]]:
    """The links of a page to files: as written, and the path in the repository."""
    folder = posixpath.dirname(path)
    written = dict.fromkeys(LINK.findall(markdown))
    return [(one, posixpath.normpath(posixpath.join(folder, one))) for one in written]


def place(path: str) -> str:
    """Where the site has a file or folder of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"source/{path}/index.md"
    return f"source/{path}.md" if Path(path).suffix in LANGUAGES else f"source/{path}"


def repository_path(at: str) -> str:
    """What the repository has for a place of a page that is not generated from code."""
    return at.removeprefix("source/") if at.startswith("source/") else f"docs/{at}"


def listing(path: str) -> list[str]:
    """The files and folders in a folder; none of a file."""
    if not (ROOT / path).is_dir():
        return []
    names = sorted(one.name for one in (ROOT / path).iterdir())
    return [f"{path}/{name}" for name in names if not name.startswith(NOT_LISTED)]


def content(path: str) -> dict[str, Any]:
    """The page of a file or folder, as arguments of `File.generated`."""
    file, title = ROOT / path, f"{HIDDEN}# {path}\n\n"
    if file.is_dir():
        lines = (f"* [{Path(one).name}]({Path(one).name})" for one in listing(path))
        return {"content": title + "\n".join(lines) + "\n"}
    if file.suffix in LANGUAGES:
        code = f"{FENCE} {LANGUAGES[file.suffix]}\n{file.read_text()}\n{FENCE}\n"
        return {"content": title + code}
    return {"abs_src_path": str(file)}


def _names(part: Any) -> Iterator[str]:
    """The pages of a part of the navigation."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, dict):
        yield from (name for one in part.values() for name in _names(one))
    else:
        yield from (name for one in part for name in _names(one))
