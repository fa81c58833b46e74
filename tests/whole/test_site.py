"""The documentation: the site builds without a warning, leaves out nothing that the program has, and its links lead
somewhere.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mounts import PATIENCE, MakeMount, read, write_files

from coordlfs import __version__
from coordlfs.commands import cli
from coordlfs.processes import exporter

pytest.importorskip("material", reason="the site needs the extra `docs`")

pytestmark = pytest.mark.xdist_group("site")  # which is built once

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
OF_THE_JOURNAL = {"COORDLFS_MOUNTPOINT", "COORDLFS_PROCESS"}  # fields of entries, and no variables


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site; a warning is an error. CI builds it nowhere else."""
    path = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def _ids(page: Path) -> set[str]:
    return set(re.findall(r' id="([^"]+)"', page.read_text()))


def _parsers() -> Iterator[tuple[str, Any]]:
    """Every command, and every command of a command, by the name of its section."""
    for name, _, parser in cli.commands():
        yield f"coordlfs-{name}", parser
        for action in parser._actions:
            if isinstance(action.choices, dict):
                yield from ((f"coordlfs-{name}-{inner}", found) for inner, found in action.choices.items())


def test_every_command_and_option_is_in_the_reference(site: Path) -> None:
    page = site / "reference" / "commands" / "index.html"
    parsers = dict(_parsers())
    assert {"coordlfs-mount", "coordlfs-analyze", "coordlfs-bench-storage"} <= set(parsers)
    assert set(parsers) <= _ids(page)
    sections = dict(re.findall(r'<h2 id="([^"]+)">(.*?)(?=<h2|\Z)', page.read_text(), re.DOTALL))
    for name, parser in parsers.items():
        options = {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}
        assert {option for option in options if f"<code>{option}" not in sections[name]} == set(), name


def test_every_figure_is_in_the_reference(site: Path, source: Path, place: Path, mount: MakeMount) -> None:
    """Those of a mount that has read something: the fields of its status, and the metrics that are made of them."""
    write_files(source, 3, 10_000)
    mounted = mount(source, "64M", "--disk-cache", place / "disk", "--disk-size", "8M")
    for name in ("item-00000", "item-00001", "item-00002"):
        read(mounted.path / name)
    figures = mounted.settle()
    text = (DOCS / "reference" / "status.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]

    def is_listed(field: str) -> bool:
        outer, _, inner = field.rpartition(".")
        return any(f"`{field}`" in row or (outer and f"`{outer}." in row and f"`.{inner}`" in row) for row in rows)

    fields = {name for name, value in figures.items() if not isinstance(value, dict)}
    fields |= {f"{name}.{inner}" for name, value in figures.items() if isinstance(value, dict) for inner in value}
    fields = {field.removeprefix("epoch.") for field in fields}  # what is said of an epoch holds for each
    assert "misses" in fields
    assert {field for field in fields if not is_listed(field)} == set()
    assert figures["residence"] in (site / "reference" / "status" / "index.html").read_text()

    metrics = (site / "reference" / "metrics" / "index.html").read_text()
    families = list(exporter.MountCollector(lambda: figures).collect())
    served = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    assert len(served) > 40
    assert {name for name in served if f"<code>{name}</code>" not in metrics} == set()


def test_no_markdown_shows_through(site: Path) -> None:
    """A list or a table that is not taken for one, as for want of an empty line, is text for `--strict`.

    So is the name of a file that a block of code should show: `ruff format` takes `--8<--` in a block of Python apart.
    """
    pages = list(site.rglob("index.html"))
    assert len(pages) > 20
    assert "SuccessiveHalvingPruner" in (site / "guides" / "optuna" / "index.html").read_text()
    for page in pages:
        text = re.sub(r"<pre.*?</pre>", "", page.read_text(), flags=re.DOTALL)
        assert re.findall(r"^(?:<p>)?(?:[*|] |\d\. |```).*|--8&lt;--.*|\{\{ .*", text, re.MULTILINE) == [], page


def _code(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from (path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".pyx", ".sh"))


def test_every_variable_is_in_the_reference() -> None:
    page = (DOCS / "reference" / "environment.md").read_text()
    texts = [path.read_text() for path in _code("coordlfs", "loader", "tools")]
    named = set(re.findall(r"\bCOORDLFS_[A-Z_]+\b", "".join(texts))) - OF_THE_JOURNAL
    assert "COORDLFS_RUNTIME_DIR" in named
    assert {name for name in named if f"`{name}`" not in page} == set()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_the_checkout_lead_somewhere(site: Path, name: str) -> None:
    links = re.findall(r"\]\((?!https?://)([^)\s]+)\)", (ROOT / name).read_text())
    for link in links:
        target, _, anchor = link.partition("#")
        assert (ROOT / target).exists(), link
        if anchor:
            page = Path(target).relative_to("docs").with_suffix("")
            assert anchor in _ids(site / page / "index.html"), link
    assert links or name == "CHANGELOG.md"


def test_what_the_code_says_of_the_documents_is_true() -> None:
    files = list(_code("coordlfs", "loader", "tools", "examples"))
    named = {(file, path) for file in files for path in re.findall(r"\bdocs/[\w/.-]+\w", file.read_text())}
    assert len(named) > 3
    assert {(file, path) for file, path in named if not (ROOT / path).exists()} == set()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_the_changelog_has_this_version() -> None:
    versions = re.findall(r"^## \[(\d[^]]*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == __version__
