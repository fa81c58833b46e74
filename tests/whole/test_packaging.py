"""The distribution: nothing of the checkout is missing in it, and `coordlfs` alone needs neither torch nor Pillow."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from mounts import PATIENCE, script

from coordlfs.commands.starting import COMPILED

ROOT = Path(__file__).parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def _packages() -> dict[str, Path]:
    """Import name and directory of every package in the checkout."""
    return {
        ".".join([name, *init.parent.relative_to(ROOT / top).parts]): init.parent
        for name, top in SETUPTOOLS["package-dir"].items()
        for init in (ROOT / top).rglob("__init__.py")
    }


def test_every_package_is_in_the_distribution() -> None:
    assert set(SETUPTOOLS["packages"]) == set(_packages())


def test_every_file_of_a_package_is_in_the_distribution() -> None:
    """But for the shell scripts, which belong to the checkout, and for what is compiled."""
    for name, top in SETUPTOOLS["package-dir"].items():
        files = [
            path for package in _packages().values() if package.is_relative_to(ROOT / top) for path in package.iterdir()
        ]
        data = [path for path in files if path.is_file() and path.suffix not in (".py", ".sh", ".so")]
        data = [path for path in data if not path.with_suffix(".pyx").exists() or path.suffix != ".c"]
        assert {str(path.relative_to(ROOT / top)) for path in data} == set(SETUPTOOLS["package-data"].get(name, []))


def test_the_package_alone_needs_no_extra() -> None:
    """Every module can be imported where the extras are not installed."""
    modules = script(
        """
import importlib, pkgutil, sys
for extra in ("torch", "PIL", "httpx", "hypothesis", "prometheus_client", "pytest", "yaml"):
    sys.modules[extra] = None
import coordlfs
for module in pkgutil.walk_packages(coordlfs.__path__, "coordlfs."):
    if module.name != "coordlfs.__main__":
        print(importlib.import_module(module.name).__name__)
""",
        cwd=ROOT,
    )
    assert "coordlfs.processes.server" in modules


def test_importing_the_package_loads_nothing_else() -> None:
    loaded = script(
        "import sys; before = set(sys.modules); import coordlfs; print(set(sys.modules) - before)", cwd=ROOT
    )
    assert loaded.strip() == "{'coordlfs'}"


def test_help_loads_nothing_that_takes_long() -> None:
    """It is there at once: what a mount needs is loaded by who mounts."""
    program = """
import contextlib, io, sys
from coordlfs.commands.cli import main
with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
    main(["--help"])
assert "usage" in said.getvalue()
print(*sys.modules)
"""
    loaded = set(script(program, cwd=ROOT).split())
    assert not loaded & {"asyncio", "httpx", "numpy", "pyfuse3", "rich", "trio", "xxhash"}
    assert len(loaded) < 150  # Python itself has 60 at its start, and argparse needs 50


def test_all_that_is_compiled_is_looked_for() -> None:
    assert {module["name"] for module in SETUPTOOLS["ext-modules"]} == {*COMPILED}


def test_without_what_is_compiled_one_line_says_so(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['coordlfs.serving.fast_path'] = None"
    program = f"{hidden}; from coordlfs.commands.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "run", str(tmp_path), "--", "true"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert done.stderr.startswith("coordlfs: coordlfs.serving.fast_path is not compiled for this Python")
    assert done.stderr.count("\n") == 1


def _programs() -> list[str]:
    """Every module that `python -m` runs for people, who give it options; others are run by programs."""
    files = [path for top in SETUPTOOLS["package-dir"].values() for path in (ROOT / top).rglob("*.py")]
    mains = {
        path for path in files if {'if __name__ == "__main__":', "import argparse"} <= set(path.read_text().split("\n"))
    }
    names = {top: name for name, top in SETUPTOOLS["package-dir"].items()}
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in mains]
    return sorted(".".join([names[top], *below]).removesuffix(".__main__") for top, *below in parts)


@pytest.mark.parametrize("program", _programs())
def test_every_program_has_help(program: str) -> None:
    said = subprocess.run([sys.executable, "-m", program, "--help"], capture_output=True, text=True, timeout=PATIENCE)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("usage: ")
