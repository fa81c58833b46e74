"""The loader on other people's machines; of what is tried of commands in tests/mount, what torch itself lives with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from environments import ENVIRONMENTS, start
from mounts import PATIENCE

_JOB = """
import sys
import torch
from coordlfs_loader import CoordinatedLoader

class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 24
    def __getitem__(self, index):
        return torch.full((1000,), index)

if __name__ == "__main__":
    loader = CoordinatedLoader(Numbers(), group=sys.argv[2], batch_size=4, num_workers=2)
    total = sum(int(batch[:, 0].sum()) for batch in loader)
    with open(sys.argv[1], "w") as f:
        f.write(str(total))
"""


@pytest.mark.parametrize("name", ["all at once", "hard limits", "no /dev/shm"])
def test_the_loader_depends_on_nothing_inherited(tmp_path: Path, name: str) -> None:
    job, total = tmp_path / "job.py", tmp_path / "total"
    job.write_text(_JOB)
    done = start(
        ENVIRONMENTS[name], tmp_path, sys.executable, job, total, f"environments-{tmp_path.name}", timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert total.read_text() == str(sum(range(24)))
