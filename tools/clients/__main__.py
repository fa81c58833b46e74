"""Runs each framework that is installed under the analyser's hook: its loader must be measured, in every section.

What is not installed is named and left out, so that CI runs a part and a developer all. docs/compatibility.md lists
what was tried.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from coordlfs_tools.analyze.hook.coordlfs_stall_hook.config import Section
from coordlfs_tools.analyze.runs import run

from coordlfs.errors import UserError

_COLD, _READY = Section("cold", 2, 5), Section("ready", 2, 5, ready=True)
_DATA = "import torch\nfrom torch.utils.data import DataLoader\ndata = torch.ones(4000, 1)\n"
_LOOP = "for epoch in range(3):\n    for batch in loader:\n        batch *= 2\n        assert batch.max() == 2\n"

# The module that must be installed, and a job of the shape that its documentation shows.
CLIENTS = {
    "torch": ("torch", _DATA + "loader = DataLoader(data, 4, shuffle=True)\n" + _LOOP),
    "torchdata": (
        "torchdata",
        _DATA
        + "from torchdata.stateful_dataloader import StatefulDataLoader\n"
        + "loader = StatefulDataLoader(data, 4, shuffle=True, num_workers=2)\n"
        + _LOOP,
    ),
    "accelerate": (
        "accelerate",
        _DATA
        + "from accelerate import Accelerator\n"
        + "loader = Accelerator(cpu=True).prepare(DataLoader(data, 4, shuffle=True))\n"
        + _LOOP,
    ),
    "torch-geometric": (
        "torch_geometric",
        _DATA
        + "from torch_geometric.data import Data\nfrom torch_geometric.loader import DataLoader\n"
        + "graphs = [Data(x=torch.ones(3, 2), edge_index=torch.zeros(2, 1, dtype=torch.long)) for _ in range(800)]\n"
        + "for epoch in range(3):\n    for batch in DataLoader(graphs, 8, shuffle=True):\n        batch.x *= 2\n"
        + "        assert batch.x.max() == 2\n        assert batch.num_graphs == 8\n",
    ),
}


def fault(name: str) -> str | None:
    """What is wrong with the framework under the analyser; None if nothing is."""
    try:
        measured = run([sys.executable, "-c", CLIENTS[name][1]], [_COLD, _READY]).measured
    except UserError as e:
        return str(e)
    if len(measured) != 1 or measured[0]["sections"].keys() != {"cold", "ready"}:
        return "its loader was not measured"
    return "; ".join(measured[0]["notes"]) or None


def main(names: list[str]) -> int:
    """Run those named, or all; the exit status is 1 if one is wrong."""
    wrong = False
    for name in names or CLIENTS:
        if name not in CLIENTS:
            print(f"{name} is not known: choose of {', '.join(CLIENTS)}", file=sys.stderr)
            return 2
        if find_spec(CLIENTS[name][0]) is None:
            print(f"{name}: not installed")
            continue
        found = fault(name)
        wrong |= found is not None
        print(f"{name}: {found or 'right'}", flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
