"""Readers as people have them, unmodified: a torch DataLoader, numpy and other formats, tar, fio; alone and many."""

from __future__ import annotations

import importlib.util
import io
import json
import mmap
import os
import shutil
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from mounts import CHUNK, MIB, PAGE, PATIENCE, MakeMount, coordlfs, forget, noise, read, resident, script, write_files

from coordlfs.kernel.writeback import write_back

_TRAIN = """
import json, os, sys, zlib
import torch
from torch.utils.data import DataLoader, Dataset

class Files(Dataset):
    def __init__(self, root):
        self.paths = sorted(os.path.join(d, f) for d, _, files in os.walk(root) for f in files)
    def __len__(self):
        return len(self.paths)
    def __getitem__(self, index):
        with open(self.paths[index], "rb") as f:
            data = f.read()
        return index, zlib.crc32(data), torch.frombuffer(bytearray(data), dtype=torch.uint8).float().mean()

def figures():
    return json.loads(os.getxattr(sys.argv[1], "user.coordl.stats"))

torch.manual_seed(0)
files = Files(sys.argv[1])
loader = DataLoader(files, batch_size=16, shuffle=True, num_workers=2, persistent_workers=True)
for epoch in range(3):
    before = figures()["source"]["bytes"]
    sums = {int(i): int(c) for index, crc, _ in loader for i, c in zip(index, crc)}
    print(json.dumps([figures()["source"]["bytes"] - before, [sums[i] for i in range(len(sums))]]))
    while figures()["pending_items"]:
        pass
    for path in files.paths:
        if os.getxattr(path, "user.coordl.cached") != b"pinned":
            with open(path, "rb") as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
"""


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("share", [2.0, 0.5])
def test_a_torch_data_loader(source: Path, mount: MakeMount, share: float) -> None:
    for directory in range(10):
        (source / f"class-{directory}").mkdir()
        write_files(source / f"class-{directory}", 40, 40_960 + directory * 1000)
    sums = [zlib.crc32(noise(40_960 + number // 40 * 1000, number % 40)) for number in range(400)]
    total = sum(40 * (40_960 + directory * 1000) for directory in range(10))
    mounted = mount(source, str(int(total * share)))
    epochs = [json.loads(line) for line in script(_TRAIN, mounted.path).splitlines()]
    assert [epoch[1] for epoch in epochs] == [sums] * 3
    figures = mounted.stats()
    assert figures["epochs"] == 3
    assert epochs[0][0] == total
    if share > 1:
        assert [epoch[0] for epoch in epochs[1:]] == [0, 0]
        assert figures["hit_rate"] == 1.0
    else:
        left = sum((source / f).stat().st_size for f in _unpinned(source, mounted.path))
        assert 0.45 * total < left < 0.55 * total
        assert epochs[2][0] == left


def _unpinned(source: Path, mountpoint: Path) -> list[str]:
    names = [str(p.relative_to(source)) for p in source.rglob("item-*")]
    return [n for n in names if os.getxattr(mountpoint / n, "user.coordl.cached") == b"no"]


def test_numpy_memmaps(source: Path, mount: MakeMount) -> None:
    # A file of tokens larger than the cache, read at random places as language models are trained.
    tokens = np.random.default_rng(0).integers(0, 50_000, 3 * CHUNK, dtype=np.uint16)
    tokens.tofile(source / "train.bin")
    np.save(source / "array.npy", tokens[:100_000].reshape(100, 1000))
    mounted = mount(source, "64M")
    mapped = np.memmap(mounted.path / "train.bin", np.uint16, "r")
    places = np.random.default_rng(1)
    for _ in range(300):
        at = places.integers(0, len(tokens) - 2048)
        assert np.array_equal(mapped[at : at + 2048], tokens[at : at + 2048])
    assert np.array_equal(mapped, tokens)
    loaded = np.load(mounted.path / "array.npy", mmap_mode="r")
    assert np.array_equal(loaded, tokens[:100_000].reshape(100, 1000))
    del mapped, loaded
    figures = mounted.settle()
    assert mounted.cached("train.bin") == "partial"
    assert figures["pinned_bytes"] > 2 * CHUNK
    assert np.array_equal(np.memmap(mounted.path / "train.bin", np.uint16, "r"), tokens)


_WRITE = {
    "safetensors": """
from safetensors.numpy import save_file
save_file({"weights": array}, path)
""",
    "HDF5": """
import h5py
with h5py.File(path, "w") as f:
    f["weights"] = array
""",
    "Arrow": """
import pyarrow as pa
table = pa.table({"weights": array})
with pa.OSFile(path, "wb") as f, pa.ipc.new_file(f, table.schema) as writer:
    writer.write_table(table)
""",
    "LMDB": """
import lmdb
with lmdb.open(path, subdir=False, lock=False, map_size=64 << 20) as env, env.begin(write=True) as change:
    for start in range(0, len(array), 10_000):
        change.put(b"%08d" % start, array[start : start + 10_000].tobytes())
""",
}
_READ = {
    "safetensors": """
from safetensors.numpy import load_file
found = load_file(path)["weights"]
""",
    "HDF5": """
import h5py
with h5py.File(path, "r") as f:
    found = f["weights"][:]
""",
    "Arrow": """
import pyarrow as pa
with pa.memory_map(path) as f:
    found = pa.ipc.open_file(f).read_all()["weights"].to_numpy()
""",
    "LMDB": """
import lmdb
with lmdb.open(path, subdir=False, lock=False, readonly=True) as env, env.begin(buffers=True) as look:
    found = np.concatenate([np.frombuffer(value, np.float32) for _, value in look.cursor()])
""",
}
_ARRAY = "import sys, numpy as np\npath, array = sys.argv[1], np.random.default_rng(0).random(3_000_000, np.float32)\n"


@pytest.mark.parametrize("form", sorted(_WRITE))
def test_files_that_libraries_map(source: Path, mount: MakeMount, form: str) -> None:
    """Bytes are right, and the second time all of them are in memory."""
    script(_ARRAY + _WRITE[form], source / "data")
    write_back(source)
    mounted = mount(source)
    check = _ARRAY + _READ[form] + "assert np.array_equal(found, array)\n"
    script(check, mounted.path / "data")
    mounted.settle()
    with mounted.messages() as sent:
        script(check, mounted.path / "data")
    assert sent["read"] == 0


@pytest.mark.parametrize("size", [5000, 110_000, 500_000])
def test_a_small_file_that_is_read_in_pieces_is_one_read(source: Path, mount: MakeMount, size: int) -> None:
    """As Pillow reads: Python's buffer is as large as the mount says is best."""
    (source / "f").write_bytes(noise(size))
    mounted = mount(source, "0")
    with mounted.messages() as sent, open(mounted.path / "f", "rb") as f:
        assert b"".join(iter(lambda: f.read(999), b"")) == noise(size)
    assert sent["read"] == 1


def test_tar_shards(source: Path, mount: MakeMount) -> None:
    contents = {f"{number:05}.bin": noise(20_000 + number, number) for number in range(300)}
    for shard in range(3):
        with tarfile.open(source / f"{shard}.tar", "w") as archive:
            for name in list(contents)[shard::3]:
                member = tarfile.TarInfo(name)
                member.size = len(contents[name])
                archive.addfile(member, io.BytesIO(contents[name]))
    mounted = mount(source, "32M")
    for _ in range(2):
        found = {}
        for shard in range(3):
            with tarfile.open(mounted.path / f"{shard}.tar") as archive:
                for member in archive:
                    extracted = archive.extractfile(member)
                    assert extracted is not None
                    found[member.name] = extracted.read()
        assert found == contents
        mounted.settle()
    assert mounted.source_bytes() == sum(p.stat().st_size for p in source.iterdir())


def test_unpacking_from_the_mount(source: Path, mount: MakeMount, place: Path) -> None:
    (place / "out").mkdir()
    tree = source / "tree"
    tree.mkdir()
    write_files(tree, 20, 30_000)
    (tree / "link").symlink_to("item-00001")
    os.link(tree / "item-00002", tree / "hard")
    mounted = mount(source)
    for _ in range(2):
        pipe = f"tar -C '{mounted.path}' -cf - tree | tar -C '{place}/out' -xf -"
        subprocess.run(["sh", "-c", pipe], check=True, timeout=PATIENCE)
        subprocess.run(["diff", "-r", tree, place / "out" / "tree"], check=True, timeout=PATIENCE)
        assert (place / "out" / "tree" / "hard").stat().st_nlink == 2


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_fio_verifies(source: Path, mount: MakeMount) -> None:
    def fio(path: Path, *arguments: str) -> None:
        common = ["--name=data", f"--filename={path}", "--size=40M", "--bs=16k", "--verify=crc32c", "--verify_fatal=1"]
        subprocess.run(["fio", *common, *arguments], check=True, capture_output=True, timeout=PATIENCE, cwd=source)

    fio(source / "data", "--rw=write", "--do_verify=0", "--ioengine=psync")
    mounted = mount(source, "30M")
    for way in (
        ["--rw=read", "--ioengine=psync"],
        ["--rw=randread", "--ioengine=psync"],
        ["--rw=read", "--ioengine=mmap"],
        ["--rw=randread", "--ioengine=libaio", "--iodepth=16", "--direct=1"],
    ):
        fio(mounted.path / "data", "--readonly", *way)
        mounted.settle()
    assert mounted.cached("data") == "partial"


_MANY = """
import mmap, os, random, sys, zlib
seed, *paths = sys.argv[1:]
choice = random.Random(seed)
for _ in range(3):
    choice.shuffle(paths)
    for path in paths:
        expected = int(path.rpartition("-")[2])
        fd = os.open(path, os.O_RDONLY)
        size = os.fstat(fd).st_size
        if choice.random() < 0.3:
            with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
                data = mapped[:]
        elif choice.random() < 0.3:
            parts = list(range(0, size, 30_000))
            choice.shuffle(parts)
            read = {at: os.pread(fd, 30_000, at) for at in parts}
            data = b"".join(read[at] for at in sorted(read))
        else:
            data = b"".join(iter(lambda: os.read(fd, 100_000), b""))
        os.close(fd)
        assert zlib.crc32(data) == expected, path
"""


@pytest.mark.parametrize("cache", ["0", "8M", "200M"])
def test_many_readers_at_once(source: Path, mount: MakeMount, cache: str) -> None:
    names = []
    for number in range(150):
        data = noise([1000, 50_000, 110_000, MIB + 3][number % 4], number)
        names.append(f"{number}-{zlib.crc32(data)}")
        (source / names[-1]).write_bytes(data)
    mounted = mount(source, cache)
    paths = [str(mounted.path / name) for name in names]
    jobs = [subprocess.Popen([sys.executable, "-c", _MANY, str(seed), *paths]) for seed in range(6)]
    try:
        while any(job.poll() is None for job in jobs):
            # Beside them somebody has the pages dropped, and the cache emptied.
            for name in names[::10]:
                forget(mounted.path / name)
            coordlfs("drop", mounted.path)
        assert [job.wait(PATIENCE) for job in jobs] == [0] * 6
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    assert mounted.settle()["pinned_bytes"] <= mounted.stats()["capacity_bytes"]


def test_a_file_read_backwards_and_in_steps(source: Path, mount: MakeMount) -> None:
    data = noise(CHUNK + 3 * MIB)
    (source / "f").write_bytes(data)
    mounted = mount(source, "100M")
    fd = os.open(mounted.path / "f", os.O_RDONLY)
    for at in range(len(data) // 50_000, -1, -1):
        assert os.pread(fd, 50_000, at * 50_000) == data[at * 50_000 : (at + 1) * 50_000]
    os.close(fd)
    mounted.settle()
    assert read(mounted.path / "f") == data
    mounted.settle()
    assert mounted.cached("f") == "pinned"
    assert resident(mounted.path / "f") == -(-len(data) // 4096)


# -- random access ------------------------------------------------------------------------------------------------


def test_random_faults_read_around_unless_they_are_announced(source: Path, mount: MakeMount) -> None:
    """MADV_RANDOM and `pread` read the pages that are asked for; a fault else as much as the kernel reads ahead."""
    data = noise(64 * MIB)
    (source / "f").write_bytes(data)
    mounted = mount(source, "0")
    number = os.stat(mounted.path).st_dev
    around = int(Path(f"/sys/class/bdi/{os.major(number)}:{os.minor(number)}/read_ahead_kb").read_text()) << 10
    places = [i * MIB + i * PAGE for i in range(1, 60, 4)]
    for how, at_most in (("pread", PAGE), ("announced", PAGE), ("fault", around)):
        forget(mounted.path / "f")
        before = mounted.source_bytes()
        with open(mounted.path / "f", "rb") as f, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            if how == "announced":
                mapped.madvise(mmap.MADV_RANDOM)
            for place in places:
                got = os.pread(f.fileno(), 16, place) if how == "pread" else mapped[place : place + 16]
                assert got == data[place : place + 16]
        assert len(places) * PAGE <= mounted.source_bytes() - before <= len(places) * at_most
