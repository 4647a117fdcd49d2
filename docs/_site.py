"""A hook of mkdocs: pages of the repository that are not in docs/ are part of the site as well.

Links are written as they work in the repository. Here a link to a file that is a page of the site
becomes a link to that page, and a link to any other file of the repository becomes plain text.
"""

from __future__ import annotations

import os
import pathlib
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).resolve().parents[1]
#: File of the repository -> page of the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "dance_jax/demo/README.md": "demo-model.md",
    "examples/train_demo/README.md": "train-demo.md",
    "research/README.md": "research.md",
}
#: Pictures, below these folders of the repository -> below these of the site.
PICTURES = {"research/figures": "figures"}

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#]+)(#[^()\s]*)?\)")
_SCHEME = re.compile(r"[a-z]+:")


def site_files() -> dict[str, str]:
    """All files that the site has, by their place in the repository."""
    found = dict(PAGES)
    for folder, target in PICTURES.items():
        for file in sorted((ROOT / folder).iterdir()):
            found[f"{folder}/{file.name}"] = f"{target}/{file.name}"
    for file in sorted((ROOT / "docs").rglob("*")):
        if file.is_file() and file.suffix != ".py":
            name = file.relative_to(ROOT).as_posix()
            found[name] = name.removeprefix("docs/")
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, place in site_files().items():
        if not name.startswith("docs/"):
            content = (ROOT / name).read_bytes()
            files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    places = site_files()
    here = next(name for name, place in places.items() if place == page.file.src_uri)
    return relinked(markdown, here, places)


def relinked(markdown: str, here: str, places: dict[str, str]) -> str:
    """The text of a page with links that work in the site.

    Args:
        markdown: as it is in the repository.
        here: the page's file in the repository.
        places: of `site_files`.
    """
    folder, own = os.path.dirname(here), os.path.dirname(places[here])

    def link(match: re.Match[str]) -> str:
        picture, text, target, anchor = match.groups()
        if _SCHEME.match(target):
            return match[0]
        name = os.path.normpath(os.path.join(folder, target))
        if name not in places:
            return text
        return f"{picture}[{text}]({os.path.relpath(places[name], own or '.')}{anchor or ''})"

    return _LINK.sub(link, markdown)
