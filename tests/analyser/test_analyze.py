"""The stall analyser on whole jobs: what it measures, what it must not change, bad input, nothing left, the report.

The jobs are scripts as users write them; they know nothing of the analyser, but for the loops of one's own.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from coordlfs_tools.analyze import scout
from coordlfs_tools.analyze.hook.coordlfs_stall_hook import ranks
from coordlfs_tools.analyze.hook.coordlfs_stall_hook.config import Section
from coordlfs_tools.analyze.hook.coordlfs_stall_hook.held import held
from coordlfs_tools.analyze.hook.coordlfs_stall_hook.opens import could_be_data
from coordlfs_tools.analyze.result import _is_far, mount_line, pin_line
from coordlfs_tools.analyze.runs import Ran, run
from coordlfs_tools.storage.files import drop, listed, resident_share
from coordlfs_tools.storage.measure import latency, measure, parts, rate
from mounts import NOBODY, PATIENCE, coordlfs, eventually
from PIL import Image

from coordlfs.kernel.writeback import write_back

FILES, SIZE, BATCH = 960, 20_480, 8
SYNTHETIC = [sys.executable, "-m", "coordlfs_tools.analyze.synthetic"]
COLD = Section("cold", skip=2, count=5)
READY = Section("ready", skip=2, count=5, ready=True, restart=True)

# A dataset of files with random augmentation, by every generator there is.
TRAINING = """
import random, sys, time
from pathlib import Path
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

class Files(Dataset):
    def __init__(self):
        self.paths = sorted(Path(sys.argv[1]).iterdir())
    def __len__(self):
        return len(self.paths)
    def __getitem__(self, index):
        data = np.frombuffer(self.paths[index].read_bytes(), np.uint8)[:64].astype(np.float32)
        noise = random.random() + np.random.random() + torch.rand(1).item()
        return torch.from_numpy(data / 255 + noise), index
"""


@pytest.fixture(scope="module")
def data() -> Iterator[Path]:
    """Files on a disk: the page cache can let go of them, which it cannot of a file system in memory."""
    directory = Path("/var/tmp") / f"coordlfs-analyze-{os.getpid()}"
    directory.mkdir()
    try:
        for i in range(FILES):
            (directory / f"{i:04}").write_bytes(random.Random(i).randbytes(SIZE))
        write_back(directory)
        yield directory
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], list[str]]:
    """Makes a job of a script's text."""

    def make(text: str) -> list[str]:
        path = tmp_path / "train.py"
        path.write_text(textwrap.dedent(text))
        return [sys.executable, str(path)]

    return make


def _hooked(temporary: Path) -> list[str]:
    """The processes that were given something to measure by an analysis whose TMPDIR is `temporary`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
            if any(word.startswith(b"COORDLFS_ANALYZE=") and os.fsencode(temporary) in word for word in words):
                found.append(entry.name)
        except OSError:
            continue
    return found


def _analyse(job: list[str], *options: str) -> dict[str, Any]:
    """What `coordlfs analyze` finds."""
    found: dict[str, Any] = json.loads(coordlfs("analyze", *options, "--json=-", "--", *job).stdout)
    return found


@pytest.fixture(scope="module")
def analysed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One analysis of a job with two workers that prepares 16 samples in 80 ms and computes for 40, and its report."""
    out = tmp_path_factory.mktemp("analysis")
    temporary = tmp_path_factory.mktemp("tmp")
    job = [*SYNTHETIC, str(data), "--prep=10", "--step=40", "--workers=2", "--validate"]
    command = [sys.executable, "-m", "coordlfs", "analyze", f"--data={data}", "--rounds=2", "--iterations=10"]
    command += [f"--json={out / 'out.json'}", f"--report={out / 'report.html'}", "--", *job]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment)
    assert done.returncode == 0, done.stderr
    assert "2 rounds of 10 iterations" in done.stderr
    assert "waiting for prep" in done.stdout
    assert not _hooked(temporary)
    assert sorted(os.listdir(out)) == ["out.json", "report.html"]
    assert os.listdir(temporary) == []
    return json.loads((out / "out.json").read_text()), out / "report.html"


@pytest.mark.xdist_group("analysed")  # which takes its time
def test_data_on_a_disk_is_to_be_pinned_or_mounted(source: Path, in_memory: Path) -> None:
    assert pin_line(source, 3 << 20) == f"coordlfs pin {source} --cache-size 3M"
    assert pin_line(in_memory, 3 << 20) is None
    assert pin_line(None, 3 << 20) is None
    assert mount_line(source, 3 << 20) == f"coordlfs mount {source} {source} --cache-size 3M"


def test_a_disk_is_advised_for_what_lies_on_none(source: Path, in_memory: Path) -> None:
    assert not _is_far(source)
    assert _is_far(in_memory)
    assert not _is_far(None)


def test_it_finds_what_is_known(analysed: tuple[dict[str, Any], Path]) -> None:
    """A busy machine makes everything slower, and nothing faster; the benchmark asks for 3 % and 2 points."""
    found, _ = analysed
    rates, stalls = found["rates"], found["stalls"]
    assert 40 < rates["ingestion"] < 405
    assert 20 < rates["prep"] < 205
    assert 20 < rates["fetch"] < 205
    assert rates["storage"] > 0
    assert rates["cache"] > 0
    assert 0.2 < stalls["prep_share"] < 0.8
    assert sum(stalls[f"{part}_share"] for part in ("compute", "prep", "fetch")) == pytest.approx(1)
    assert found["job"]["sample_bytes"] == SIZE
    assert found["job"]["samples"] == FILES
    assert (found["job"]["workers"], found["job"]["batch"], found["version"]) == (2, 16, 1)
    assert [loader["training"] for loader in found["job"]["loaders"]] == [True]
    assert set(found["what_if"]) == {"cache", "workers", "storage", "gpu", "jobs", "nodes"}
    assert found["verdict"][0].startswith("This job waits for its data to be prepared")
    assert not found["advice"]["helps"]
    assert found["advice"]["workers"] > 2  # it sleeps: more of them would do it faster
    for name, (low, high) in found["spread"].items():
        assert low <= (rates | stalls)[name] <= high


# -- jobs of every kind ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_script_that_moves_its_data_to_a_device(workers: int, data: Path, script: Callable[[str], list[str]]) -> None:
    """Validation comes first, and is not what is measured; the minibatches are changed in place."""
    job = script(
        TRAINING
        + f"""
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = torch.nn.Linear(64, 1).to(device)
train = DataLoader(Files(), {BATCH}, shuffle=True, num_workers={workers}, pin_memory=torch.cuda.is_available())
valid = DataLoader(Files(), 4)
for epoch in range(9):
    with torch.no_grad():
        for number, (x, _) in enumerate(valid):
            model(x.to(device))
            if number == 3:
                break
    for x, index in train:
        x = x.to(device)
        assert 0 < x.mean() < 5, "not a fresh minibatch"
        x.mul_(1000)
        model(x).sum().backward()
        time.sleep(0.01)
"""
    )
    ran = run([*job, str(data)], [COLD, READY], data=data)
    (result,) = ran.measured
    assert [(loader["number"], loader["training"]) for loader in result["loaders"]] == [(1, False), (2, True)]
    assert result["measured"] == 2
    assert result["source"]["workers"] == workers
    for section in result["sections"].values():
        assert section["samples"] == 5 * BATCH
        assert section["seconds"] >= 5 * 0.01
    chosen = run([*job, str(data)], [COLD], data=data, loader=1)
    assert chosen.measured[0]["sections"]["cold"]["samples"] == 5 * 4


def test_what_a_sample_is_read_as_is_exact(data: Path, script: Callable[[str], list[str]]) -> None:
    """Two files for each sample, one of them opened by C code, which the interpreter does not see."""
    job = script(
        TRAINING
        + """
import ctypes
libc = ctypes.CDLL(None)
class Pairs(Files):
    def __len__(self):
        return len(self.paths) // 2
    def __getitem__(self, index):
        fd = libc.open(str(self.paths[2 * index + 1]).encode(), 0)
        buffer = ctypes.create_string_buffer(1 << 20)
        assert libc.read(fd, buffer, len(buffer)) > 0
        libc.close(fd)
        return super().__getitem__(2 * index)
for x, index in DataLoader(Pairs(), 4, shuffle=True, num_workers=1):
    time.sleep(0.01)
"""
    )
    found = _analyse([*job, str(data)], f"--data={data}", "--rounds=1", "--iterations=5")
    # Less only if somebody else empties the page cache meanwhile.
    assert 1.2 * SIZE < found["job"]["sample_bytes"] <= 2 * SIZE
    assert found["job"]["samples"] == FILES // 2


def _ran(opened: Iterable[Path], held: Iterable[Path] = (), packages: Iterable[Path] = ()) -> Ran:
    results: list[dict[str, Any]] = [{"packages": [f"{package}/" for package in packages]}]
    return Ran(results, [*map(str, opened)], {*map(str, held)}, True, 1.0)


def test_where_the_data_lies_is_seen(tmp_path: Path) -> None:
    """By what is opened: almost all of that, for a script also opens other files."""
    opened = [tmp_path / "config.yaml", *(tmp_path / "data" / f"class-{i % 3}" / f"{i}.jpg" for i in range(20))]
    for path in opened:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"something")
    notes: list[str] = []
    directory, files = scout.where_opened(_ran([*opened, tmp_path / "gone"]), notes)
    assert directory == tmp_path / "data"
    assert len(files) == 20
    assert scout.where_opened(_ran([]), notes) == (None, [])
    assert "--data" in notes[-1]
    assert scout.where_opened(_ran(opened, packages=[tmp_path / "data"]), notes) == (None, [])  # a package's own files
    assert scout.where_opened(_ran(opened[:2]), notes) == (None, [])  # two small files are no dataset


def test_where_native_code_reads_is_seen_by_what_stays_open(tmp_path: Path) -> None:
    meta, tokens = tmp_path / "meta.json", tmp_path / "tokens" / "tokens.bin"
    meta.write_text("{}")
    tokens.parent.mkdir()
    tokens.write_bytes(bytes(2 << 20))
    with tokens.open("rb") as f, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ):
        assert str(tokens) in held(os.getpid())
    assert str(tokens) not in held(os.getpid())
    assert scout.where_opened(_ran([meta], [tokens]), [])[0] == tokens.parent
    notes: list[str] = []
    ran, files = _ran([meta], [tokens]), listed(tmp_path)
    for seen in (100 << 20, None, 0):  # readahead; the page cache cannot be asked; nothing went through it
        size = scout._sample_bytes(tmp_path, files, ran, seen, 10, 1000, notes)
        assert 0 < size * 1000 <= (2 << 20) + 2


@pytest.mark.parametrize(
    "path",
    ["/opt/x/pkg-1.0.dist-info/METADATA", "/x/site-packages/a/b.json", "/x/lib.so.1", "/usr/share/a", "/x/a.py"],
)
def test_what_python_opens_by_itself_is_no_data(path: str) -> None:
    assert not could_be_data(path)
    assert could_be_data("/data/a.jpg")


def test_an_iterable_dataset_is_run_again_on_warm_data(data: Path, script: Callable[[str], list[str]]) -> None:
    job = script(
        TRAINING
        + f"""
class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        files = Files()
        return (files[i] for i in range(len(files)))
for x, index in DataLoader(Stream(), {BATCH}):
    time.sleep(0.01)
"""
    )
    found = _analyse([*job, str(data)], f"--data={data}", "--rounds=1", "--iterations=5")
    assert found["rates"]["ingestion"] < 100 * BATCH
    assert found["job"]["sample_bytes"] == SIZE
    assert not [note for note in found["notes"] if "not warm" in note]


LOOP = """
import time
from coordlfs_tools.analyze import analyzer
def source():
    while True:
        time.sleep(0.03)
        yield [0] * 4
for batch in {loop}:
    with {block}:
        time.sleep(0.01)
"""


@pytest.mark.parametrize(
    ("loop", "block"),
    [
        ("source()", "analyzer.iteration(samples=4)"),
        ("analyzer.batches(source(), samples=4)", "__import__('contextlib').nullcontext()"),
    ],
    ids=["iteration", "batches"],
)
def test_loops_of_ones_own(loop: str, block: str) -> None:
    program = LOOP.format(loop=loop, block=block)
    found = _analyse([sys.executable, "-c", program], "--rounds=1", "--iterations=10")
    assert found["stalls"]["compute_share"] == pytest.approx(0.25, abs=0.15)
    assert found["stalls"]["prep_share"] == pytest.approx(0.75, abs=0.2)
    assert found["rates"]["storage"] is None
    assert any("--data" in note for note in found["notes"])


OVERRIDES = {
    "__iter__ without super()": """
class Loader(DataLoader):
    def __iter__(self):
        self.iterator = self._get_iterator()
        return self.iterator
""",
    "_get_iterator": """
class Loader(DataLoader):
    def _get_iterator(self):
        from torch.utils.data.dataloader import _SingleProcessDataLoaderIter
        class Own(_SingleProcessDataLoaderIter):
            pass
        return Own(self)
""",
    "a wrapper that prefetches": """
class Loader:
    def __init__(self, *arguments, **named):
        self.inner = DataLoader(*arguments, **named)
        self.batch_sampler = self.inner.batch_sampler
    def __iter__(self):
        iterator = iter(self.inner)
        ahead = next(iterator)
        for batch in iterator:
            yield ahead
            ahead = batch
        yield ahead
""",
}


@pytest.mark.parametrize("how", OVERRIDES)
def test_a_loader_that_begins_otherwise_is_measured(how: str, script: Callable[[str], list[str]]) -> None:
    """And its sampler and batch sampler are the program's own, before and while it is measured."""
    job = script(
        "import torch\nfrom torch.utils.data import BatchSampler, DataLoader, RandomSampler\n"
        + OVERRIDES[how]
        + """
loader = Loader(torch.arange(400.0), 4, shuffle=True)
for epoch in range(60):
    assert type(loader.batch_sampler) is BatchSampler
    assert type(loader.batch_sampler.sampler) is RandomSampler
    for number, batch in enumerate(loader):
        assert type(loader.batch_sampler) is BatchSampler
        batch *= 1000
        assert batch.max() <= 400_000
"""
    )
    (result,) = run(job, [COLD, READY]).measured
    assert result["sections"].keys() == {"cold", "ready"}
    assert result["sections"]["cold"]["samples"] == 5 * 4
    assert result["notes"] == []


RANKS = (
    TRAINING
    + """
import torch.distributed as dist
from torch.utils.data import DistributedSampler
dist.init_process_group("gloo")
files = Files()
weight = torch.zeros(2)
for epoch in range(9):
    for x, index in DataLoader(files, 4, sampler=DistributedSampler(files), num_workers=1):
        time.sleep(0.01 * (1 + dist.get_rank()))
        dist.all_reduce(weight)
"""
)


def test_all_ranks_of_torchrun_are_measured_and_one_reports(data: Path, script: Callable[[str], list[str]]) -> None:
    """Rank 1 is slower, and rank 0 waits for it."""
    job = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    job += [*script(RANKS)[1:], str(data)]
    found = _analyse(job, f"--data={data}", "--rounds=1", "--iterations=5")
    assert (found["job"]["ranks"], found["job"]["processes"]) == (2, 2)
    assert found["job"]["samples"] == FILES
    assert found["job"]["sample_bytes"] == SIZE
    assert found["rates"]["ingestion"] < 2 * 4 / 0.02  # both, at the pace of the slower


def test_a_rank_without_a_loader_hangs_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_PATIENCE", 0.1)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    meetings = ranks.Meetings(str(tmp_path))
    (tmp_path / "meet-first-1").touch()
    assert meetings.meet("first")
    assert not meetings.meet("second")
    monkeypatch.setattr(ranks, "_PATIENCE", 1e9)
    assert not meetings.meet("third")  # and it waits no more


STAND_IN = """
import time
class DALIGenericIterator:
    def __init__(self):
        self.batch_size, self._at = 4, 0
    def __iter__(self):
        return self
    def __len__(self):
        return 200
    def __next__(self):
        if self._at >= len(self):
            raise StopIteration
        self._at += 1
        time.sleep(0.02)
        return [{"data": [0] * 4}]
    def reset(self):
        self._at = 0
class DALIClassificationIterator(DALIGenericIterator):
    pass
"""


def test_an_iterator_of_its_own_as_those_of_dali(tmp_path: Path) -> None:
    """DALI is not here: a module with its name stands in, and this says only what happens to such a class."""
    place = tmp_path / "nvidia" / "dali" / "plugin"
    place.mkdir(parents=True)
    (place / "pytorch.py").write_text(STAND_IN)
    program = f"""
import sys, time
sys.path.insert(0, {str(tmp_path)!r})
from nvidia.dali.plugin.pytorch import DALIClassificationIterator
loader = DALIClassificationIterator()
for batch in loader:
    time.sleep(0.01)
loader.reset()
"""
    found = _analyse([sys.executable, "-c", program], "--rounds=1", "--iterations=10")
    assert found["job"]["kind"] == "DALIGenericIterator"
    assert 20 < found["rates"]["prep"] < 202
    assert 40 < found["rates"]["ingestion"] < 404
    (result,) = run([sys.executable, "-c", program]).results
    assert result["loaders"][0]["passes"][0]["iterations"] == 200


def test_a_coordinated_loader(data: Path, script: Callable[[str], list[str]]) -> None:
    job = script(
        TRAINING
        + f"""
from coordlfs_loader import CoordinatedLoader
for x, index in CoordinatedLoader(Files(), 4, shuffle=True, num_workers=2, group="analyser-{os.getpid()}"):
    time.sleep(0.01)
"""
    )
    found = _analyse([*job, str(data)], f"--data={data}", "--rounds=1", "--iterations=5")
    assert (found["job"]["kind"], found["job"]["workers"]) == ("CoordinatedLoader", 2)
    assert 0 < found["rates"]["ingestion"] < 404
    assert found["rates"]["prep"] > 0
    assert SIZE <= found["job"]["sample_bytes"] <= 10 * SIZE


# -- it changes nothing ---------------------------------------------------------------------------------------------


def test_losses_and_order_are_the_same_with_the_hook_and_without(
    data: Path, tmp_path: Path, script: Callable[[str], list[str]]
) -> None:
    job = script(
        TRAINING
        + f"""
torch.manual_seed(1), random.seed(1), np.random.seed(1)
files = Files()
model = torch.nn.Linear(64, 1)
optimizer = torch.optim.SGD(model.parameters(), 1e-3)
generator = torch.Generator().manual_seed(2)
loaders = [
    DataLoader(files, {BATCH}, shuffle=True),
    DataLoader(files, {BATCH}, shuffle=True, num_workers=2, generator=generator),
    DataLoader(files, {BATCH}, shuffle=True, num_workers=2, persistent_workers=True, prefetch_factor=3),
]
for epoch in range(2):
    for loader in loaders:
        for number, (x, index) in enumerate(loader):
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(index.tolist(), loss.item().hex())
            if number == 30:
                break
    with torch.no_grad():
        for x, index in DataLoader(files, 60):
            print(model(x).sum().item().hex())
print(torch.get_rng_state().sum(), generator.get_state().sum(), random.random(), np.random.random())
"""
    )
    job.append(str(data))
    plain = subprocess.run(job, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
    assert len(plain.splitlines()) == 2 * (3 * 31 + 16) + 1
    trace = tmp_path / "trace"
    done = coordlfs("analyze", f"--data={data}", f"--trace={trace}", "--", *job)
    assert done.stdout == plain
    # Workers were ahead when their loops were left.
    assert len(trace.read_text().splitlines()) >= 2 * (3 * 31 * BATCH + FILES)
    done = coordlfs("simulate", f"--trace={trace}", "--cache=50%", "--policy=minio", "--json=-")
    assert json.loads(done.stdout)["items"] == FILES


def test_loaders_that_are_not_measured_are_timed_and_their_iterators_stay_theirs(
    data: Path, script: Callable[[str], list[str]]
) -> None:
    job = script(
        TRAINING
        + """
loader = DataLoader(Files(), 60)
iterator = iter(loader)
assert type(iterator).__name__ == "_SingleProcessDataLoaderIter", type(iterator)
assert len(iterator) == 16
for passing in iterator, loader:
    for _ in passing:
        time.sleep(0.005)
with torch.no_grad():
    for _ in DataLoader(Files(), 480):
        pass
"""
    )
    (result,) = run([*job, str(data)], data=data, opens=True).results
    trains, validates = result["loaders"]
    assert (trains["training"], validates["training"]) == (True, False)
    assert [each["iterations"] for each in trains["passes"]] == [16, 16]
    assert [each["iterations"] for each in validates["passes"]] == [2]
    assert all(each["compute"] >= 16 * 0.005 for each in trains["passes"])
    assert result["loaders"][0]["dataset"] == "Files"


def test_ones_own_sitecustomize_runs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.theirs = True\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    program = "import sys, sitecustomize; print(sys.theirs, [p for p in sys.path if 'hook' in p])"
    out = tmp_path / "out"
    assert run(["sh", "-c", f'"$@" > {out}', "sh", sys.executable, "-c", program]).hooked
    assert out.read_text().startswith("True []")


# -- bad input ------------------------------------------------------------------------------------------------------

SHORT = """
import time, torch
from torch.utils.data import DataLoader
for batch in DataLoader(torch.zeros({n}, 1), 4):
    time.sleep(0.001)
    {then}
"""
STOPS = """
import itertools, time
from coordlfs_tools.analyze.synthetic import Files
from pathlib import Path
from torch.utils.data import DataLoader
for batch in itertools.islice(DataLoader(Files(Path("DATA"), 0.0), 4), 30):
    time.sleep(0.001)
"""
NO_GRAD = "import torch; torch.set_grad_enabled(False)\n"
LOADERS = r"torch\.utils\.data.*nvidia\.dali.*coordlfs_loader.*analyzer"


@pytest.mark.parametrize(
    ("job", "status", "words"),
    [
        (["false"], 1, r"ended with status 1: false and said nothing$"),
        (["sh", "-c", "echo a reason; exit 7"], 1, r"ended with status 7: .*\n  a reason$"),
        (["sh", "-c", "kill -9 $$"], 1, r"was killed by SIGKILL"),
        (["/nowhere/train"], 2, r"cannot be run: No such file"),
        (["true"], 1, rf"used no loader \(no Python started.*{LOADERS}"),
        ([sys.executable, "-c", "print(1)"], 1, rf"used no loader; looked for: {LOADERS}"),
        ([sys.executable, "-c", SHORT.format(n=24, then="")], 1, r"smaller than a measurement needs.*after 6 minib"),
        ([sys.executable, "-c", SHORT.format(n=400, then="break")], 1, r"ended by itself after 1 of the 12"),
        ([sys.executable, "-c", SHORT.format(n=400, then="")], 1, r"read nothing from /"),
        ([sys.executable, "-c", STOPS], 1, r"ended by itself after 30 of the"),
        ([sys.executable, "-c", NO_GRAD + SHORT.format(n=400, then="")], 1, r"no loader was used for training.*: 1 "),
    ],
)
def test_bad_jobs_are_told(job: list[str], status: int, words: str, data: Path, tmp_path: Path) -> None:
    job = [word.replace("DATA", str(data)) for word in job]
    done = coordlfs("analyze", f"--data={data}", f"--report={tmp_path / 'report.html'}", "--", *job, status=status)
    assert re.search(f"^coordlfs: .*{words}", done.stderr, re.M), done.stderr
    assert len(done.stderr.splitlines()) - ("rounds of" in done.stderr) == words.count(r"\n") + 1
    assert done.stdout == ""
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data=/nowhere"], "/nowhere does not exist"),
        (["--data=/etc/passwd"], "is not a directory"),
        (["--iterations=0"], "at least 1"),
        (["--rounds=0"], "at least 1"),
        (["--report=/nowhere/report.html"], "cannot be written"),
        (["--data=."], "no files"),
    ],
)
def test_bad_usage_is_told_before_anything_runs(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = coordlfs("analyze", *options, "--", "touch", str(tmp_path / "ran"), status=2)
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_no_command_and_too_many_iterations(data: Path) -> None:
    assert "analyze needs a command" in coordlfs("analyze", status=2).stderr
    done = coordlfs("analyze", f"--data={data}", "--iterations=1000", "--", *SYNTHETIC, data, status=1)
    assert "give at most" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_it_leaves_nothing(number: signal.Signals, data: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "coordlfs", "analyze", f"--data={data}", f"--report={tmp_path / 'report.html'}"]
    process = subprocess.Popen(
        [*command, "--", *SYNTHETIC, str(data), "--step=100"],
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: len(_hooked(temporary)) >= 3, what="the job and its workers")
        time.sleep(0.3)
        pids = _hooked(temporary)
        process.send_signal(number)
        assert process.wait(PATIENCE) == (-number if number == signal.SIGKILL else 128 + number)
    finally:
        process.kill()
        process.wait()
    if number == signal.SIGKILL:
        eventually(lambda: not _hooked(temporary), what="the job's end: its workers look for it every five seconds")
    else:
        assert not _hooked(temporary)
        assert os.listdir(temporary) == []
    assert os.listdir(tmp_path) == ["tmp"]
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("torch_") and name.split("_")[1] in pids]


def test_it_needs_no_root(data: Path) -> None:
    """As an ordinary user, who may also read the checkout, wherever that lies."""
    caps = "-all,+dac_read_search"
    setpriv = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    setpriv += [f"--{kind}={caps}" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
    command = [*setpriv, sys.executable, "-m", "coordlfs", "analyze", f"--data={data}", "--rounds=1", "--iterations=5"]
    command += ["--json=-", "--", *SYNTHETIC, str(data), "--prep=1", "--step=10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env={**os.environ, "HOME": "/"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["rates"]["storage"] > 0
    assert "cold by posix_fadvise(DONTNEED) on each file" in found["notes"]


# -- the report -----------------------------------------------------------------------------------------------------

CHROMIUM = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
CHROMIUM += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
LAID_OUT = """<script>addEventListener("load", () => {
const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.right, r.height] };
document.title = JSON.stringify({width: innerWidth, scroll: document.documentElement.scrollWidth,
  boxes: [...document.querySelectorAll("h1, table, pre, svg")].map(box)}) })</script>"""


def _chromium(directory: Path, *arguments: str) -> str:
    """What it prints; with a profile of its own, and no name that could be resolved."""
    profile = directory / "profile"
    command = ["chromium", *CHROMIUM, "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(profile)
    return done.stdout


def _asked_by_the_page(log: Path) -> set[str]:
    """What a page asked the network for. Chromium asks as well, for itself; that has no origin."""
    return {
        event["params"]["url"]
        for event in json.loads(log.read_text())["events"]
        if event.get("params", {}).get("initiator", "not an origin") != "not an origin"
        and event["params"].get("url", "").startswith("http")
    }


@pytest.mark.xdist_group("analysed")  # which takes its time
@pytest.mark.parametrize("width", [1280, 500])
def test_the_report_fits(width: int, analysed: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(analysed[1].read_text().replace("</body>", LAID_OUT + "</body>"))
    dom = _chromium(tmp_path, f"--window-size={width},800", "--dump-dom", page.as_uri())
    seen = json.loads(dom.partition("<title>")[2].partition("</title>")[0])
    assert seen["scroll"] <= seen["width"] == width
    assert len(seen["boxes"]) >= 5
    for left, right, height in seen["boxes"]:
        assert 0 <= left < right <= width
        assert height > 10


@pytest.mark.xdist_group("analysed")  # which takes its time
def test_the_report_draws_and_prints(analysed: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    found, report = analysed
    shot, pdf = tmp_path / "shot.png", tmp_path / "page.pdf"
    _chromium(tmp_path, "--window-size=1280,2200", f"--screenshot={shot}", report.as_uri())
    with Image.open(shot) as image:
        picture = image.convert("RGB")
    colours = {colour: n for n, colour in picture.getcolors(1 << 24) or []}
    for drawn in ((0x3B, 0x7D, 0x4F), (0xE0, 0xA0, 0x30), (0x1F, 0x5F, 0xA8)):  # computing, prep, a curve
        assert colours.get(drawn, 0) > 300
    for column in (0, 5, 1274, 1279):
        assert {picture.getpixel((column, y)) for y in range(0, 2200, 7)} == {(255, 255, 255)}
    _chromium(tmp_path, f"--print-to-pdf={pdf}", "--no-pdf-header-footer", report.as_uri())
    printed = subprocess.run(["pdftotext", "-layout", pdf, "-"], capture_output=True, text=True, check=True).stdout
    assert 1 <= printed.count("\f") <= 3
    assert " ".join(found["verdict"][0].split()[:6]) in printed


@pytest.mark.xdist_group("analysed")  # which takes its time
def test_the_report_asks_the_network_for_nothing(analysed: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    page, log = tmp_path / "page.html", tmp_path / "net.json"
    _chromium(tmp_path, "--dump-dom", f"--log-net-log={log}", analysed[1].as_uri())
    assert _asked_by_the_page(log) == set()
    page.write_text('<img src="http://example.invalid/picture.png">')  # and that would be seen
    _chromium(tmp_path, "--dump-dom", f"--log-net-log={log}", page.as_uri())
    assert _asked_by_the_page(log) == {"http://example.invalid/picture.png"}


# -- storage --------------------------------------------------------------------------------------------------------


def test_storage_is_read_cold_then_warm(data: Path) -> None:
    files = listed(data)
    assert sum(part.length for part in parts(files, 4096)) == FILES * SIZE

    def resident_once_read() -> float | None:
        assert drop(files).cold
        assert resident_share(files) == 0
        speed, left = rate(parts(files), 2, 60)
        assert speed > 0
        assert left == []
        return resident_share(files)

    # Not at once, if the machine takes a page back meanwhile that it thinks is idle (idle_reclaim.py).
    assert any(resident_once_read() == 1 for _ in range(3))
    taken, left = latency(parts(files), 0.05, 0.001)
    assert 0 < taken < 0.05
    assert 0 < len(left) < FILES
    rates = measure(files, 2, seconds=0.2, rounds=2)
    assert min(rates.storage) > 0
    assert len(rates.cache) == 2
    done = coordlfs("bench", "storage", data, "--seconds=0.1", "--rounds=1", "--json")
    found = json.loads(done.stdout)
    assert found["bytes"] == FILES * SIZE
    assert 0 < found["storage_latency"] < 1
