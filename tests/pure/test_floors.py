"""The floors of the packages, for what import-linter does not read: imports of the compiled modules and their stubs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
FLOORS = {package.strip(): i for i, layer in enumerate(CONTRACTS[0]["layers"]) for package in layer.split(":")}
COMPILED = sorted(path for kind in ("pyx", "pxd", "pyi") for path in (ROOT / "coordlfs").glob(f"*/*.{kind}"))
_IMPORT = re.compile(r"^\s*(?:from|import|cimport) +coordlfs\.(\w+)", re.MULTILINE)


def test_there_are_floors_and_compiled_modules() -> None:
    assert len(FLOORS) > 8
    assert {path.suffix for path in COMPILED} == {".pyx", ".pxd", ".pyi"}


@pytest.mark.parametrize("path", COMPILED, ids=lambda path: path.name)
def test_compiled_modules_import_downwards(path: Path) -> None:
    for package in _IMPORT.findall(path.read_text()):
        assert FLOORS[package] >= FLOORS[path.parent.name], f"{path.parent.name} must not import {package}"
