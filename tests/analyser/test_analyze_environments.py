"""The analyser on other people's machines: where much of what a process is given is unusual at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from environments import ENVIRONMENTS, start

_JOB = """
import sys
from pathlib import Path
from torch.utils.data import DataLoader, Dataset

class Files(Dataset):
    def __init__(self):
        self.paths = sorted(Path(sys.argv[1]).iterdir())
    def __len__(self):
        return len(self.paths)
    def __getitem__(self, index):
        return len(self.paths[index].read_bytes())

if __name__ == "__main__":
    for sizes in DataLoader(Files(), batch_size=8, num_workers=1):
        pass
"""


def test_the_analyser_depends_on_nothing_inherited(tmp_path: Path) -> None:
    (data := tmp_path / "data").mkdir()
    for number in range(200):
        (data / str(number)).write_bytes(bytes(4000))
    job, found = tmp_path / "job.py", tmp_path / "found.json"
    job.write_text(_JOB)
    command = [Path(sys.executable).with_name("coordlfs"), "analyze", f"--data={data}", f"--json={found}"]
    command += ["--rounds=1", "--iterations=5", "--", sys.executable, job, data]
    done = start(ENVIRONMENTS["all at once"], tmp_path, *command, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(found.read_text())["job"]["samples"] == 200
