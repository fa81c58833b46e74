"""Hooks of MkDocs (mkdocs.yml): add the pages that are made from the code, and CHANGELOG.md, to the site."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from coordlfs_tools.docs import reference

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

_RESIDENCES = "{{ residences }}"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    root = Path(config.config_file_path).parent
    made = {
        "reference/commands.md": reference.commands(),
        "reference/metrics.md": reference.metrics(),
        "changelog.md": (root / "CHANGELOG.md").read_text(),
    }
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in what pages quote of the code."""
    return markdown.replace(_RESIDENCES, reference.residences())
