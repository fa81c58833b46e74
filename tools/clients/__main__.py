"""Runs each framework that is installed, for real: with its data through a mount, and under the analyser's hook.

Its job checks what it reads. Its loader must be measured in every section, and it may change its minibatches. What is
not installed is named and left out, so that CI runs a part and a developer all. docs/compatibility.md lists what was
tried.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from coordlfs_tools.analyze.hook.coordlfs_stall_hook.config import Section
from coordlfs_tools.analyze.runs import run
from coordlfs_tools.lab.mounts import coordlfs

from coordlfs.errors import UserError

_COLD, _READY = Section("cold", 2, 5), Section("ready", 2, 5, ready=True)


class Client(NamedTuple):
    """The module that must be installed; what makes its data in the directory `path`; and a job that reads it there,
    of the shape that the framework's documentation shows.
    """

    module: str
    data: str
    job: str


# A sample is its number, a thousand times; half of them belong to each of two classes.
_NUMBERS = """
import numpy as np
for number in range(400):
    np.save(f"{path}/{number}.npy", np.full(1000, number, np.float32))
"""
_FILES = """
import numpy as np, torch
class Files(torch.utils.data.Dataset):
    def __len__(self): return 400
    def __getitem__(self, number): return np.load(f"{path}/{number}.npy"), number
"""
_LOOP = """
for epoch in range(3):
    seen = 0
    for x, number in loader:
        assert (x == number[:, None]).all()
        seen += int(number.sum())
        x *= 2
    assert seen == 400 * 399 // 2
"""

CLIENTS = {
    "torch": Client(
        "torch",
        _NUMBERS,
        _FILES + "loader = torch.utils.data.DataLoader(Files(), 4, shuffle=True, num_workers=2)" + _LOOP,
    ),
    "torchdata": Client(
        "torchdata",
        _NUMBERS,
        _FILES
        + "from torchdata.stateful_dataloader import StatefulDataLoader\n"
        + "loader = StatefulDataLoader(Files(), 4, shuffle=True, num_workers=2)"
        + _LOOP,
    ),
    "accelerate": Client(
        "accelerate",
        _NUMBERS,
        _FILES
        + "from accelerate import Accelerator\n"
        + "loader = Accelerator(cpu=True).prepare(torch.utils.data.DataLoader(Files(), 4, shuffle=True))"
        + _LOOP,
    ),
    "torch-geometric": Client(
        "torch_geometric",
        _NUMBERS,
        """
import numpy as np, torch
from torch_geometric.data import Data, Dataset
from torch_geometric.loader import DataLoader
class Graphs(Dataset):
    def len(self): return 400
    def get(self, number):
        x = torch.from_numpy(np.load(f"{path}/{number}.npy")).view(10, 100)
        return Data(x=x, y=number, edge_index=torch.zeros(2, 1, dtype=torch.long))
for epoch in range(3):
    for batch in DataLoader(Graphs(), 4, shuffle=True, num_workers=2):
        assert batch.num_graphs == 4
        assert (batch.x == batch.y[batch.batch][:, None]).all()
        batch.x *= 2
""",
    ),
    "datasets": Client(
        "datasets",
        """
import datasets
rows = {"x": [[float(number)] * 1000 for number in range(400)], "number": list(range(400))}
datasets.Dataset.from_dict(rows).save_to_disk(path)
""",
        """
import datasets, torch
loader = torch.utils.data.DataLoader(datasets.load_from_disk(path).with_format("torch"), 4, shuffle=True)
for epoch in range(3):
    for batch in loader:
        assert (batch["x"] == batch["number"][:, None]).all()
        batch["x"] *= 2
""",
    ),
    "webdataset": Client(
        "webdataset",
        """
import numpy as np, webdataset
with webdataset.ShardWriter(f"{path}/%d.tar", maxcount=100, verbose=0) as shards:
    for number in range(400):
        shards.write({"__key__": str(number), "npy": np.full(1000, number, np.float32), "cls": number})
""",
        """
import webdataset
dataset = webdataset.WebDataset([f"{path}/{shard}.tar" for shard in range(4)], shardshuffle=4)
loader = webdataset.WebLoader(dataset.shuffle(50).decode().to_tuple("npy", "cls"), batch_size=4, num_workers=2)"""
        + _LOOP,
    ),
    "DALI": Client(
        "nvidia.dali",
        """
import os
from PIL import Image
for label in range(2):
    os.mkdir(f"{path}/{label}")
    for number in range(200):
        Image.new("RGB", (32, 32), (100 * label, number, 0)).save(f"{path}/{label}/{number}.png")
""",
        """
from nvidia.dali import fn, pipeline_def
from nvidia.dali.plugin.pytorch import DALIClassificationIterator
@pipeline_def(batch_size=4, num_threads=2, device_id=None)
def pipeline():
    data, label = fn.readers.file(file_root=path, random_shuffle=True, name="files")
    return fn.decoders.image(data, device="cpu"), label
loader = DALIClassificationIterator(pipeline(), reader_name="files", auto_reset=True)
for epoch in range(3):
    for [batch] in loader:
        assert (batch["data"][..., 0] == 100 * batch["label"][:, :, None]).all()
        batch["data"] += 1
""",
    ),
}


def is_installed(name: str) -> bool:
    """Whether a framework is here."""
    try:
        return find_spec(CLIENTS[name].module) is not None
    except ModuleNotFoundError:  # of what it lies in
        return False


def _command(code: str, path: Path) -> list[str]:
    return [sys.executable, "-W", "ignore", "-c", f"path = {os.fspath(path)!r}\n{code}"]


def prepare(name: str, path: Path) -> None:
    """Make a framework's data in a directory."""
    subprocess.run(_command(CLIENTS[name].data, path), check=True, capture_output=True)


def fault(name: str, path: Path) -> str | None:
    """What is wrong with the framework and its data in a directory, under the analyser; None if nothing is."""
    try:
        measured = run(_command(CLIENTS[name].job, path), [_COLD, _READY]).measured
    except UserError as e:
        return str(e)
    if len(measured) != 1 or measured[0]["sections"].keys() != {"cold", "ready"}:
        return "its loader was not measured"
    return "; ".join(measured[0]["notes"]) or None


def _mounted_fault(name: str) -> str | None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as source:
        prepare(name, Path(source))
        with coordlfs(Path(source), 64 << 20) as mount:
            return fault(name, mount.point)


def main(names: list[str]) -> int:
    """Run those named, or all; the exit status is 1 if one is wrong."""
    wrong = False
    for name in names or CLIENTS:
        if name not in CLIENTS:
            print(f"{name} is not known: choose of {', '.join(CLIENTS)}", file=sys.stderr)
            return 2
        if not is_installed(name):
            print(f"{name}: not installed")
            continue
        found = _mounted_fault(name)
        wrong |= found is not None
        print(f"{name}: {found or 'right'}", flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
