"""The distribution: nothing of the checkout is missing in it, and `coordlfs` alone needs neither torch nor Pillow."""

from __future__ import annotations

import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from mounts import COORDLFS, PATIENCE, script

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


@pytest.mark.parametrize("command", [[sys.executable, "-c", "import coordlfs"], [*COORDLFS, "--help"]])
def test_it_starts_within_300_ms(command: list[str]) -> None:
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) <= 0.3  # the best, since other tests' ends may take the cores


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
