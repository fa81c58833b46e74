"""Prometheus: addresses, names of metrics, and the figures of a real mount as scraped over HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from mounts import MIB, MakeMount, Mount, coordlfs, eventually, read, script, write_files
from prometheus_client.parser import text_string_to_metric_families

from coordlfs.errors import UserError
from coordlfs.processes import exporter

EXPLAINED = {
    "processes",
    "epoch",
    "epoch_history",
    "hits_known_by",
    "hints.jobs",
    "disk.stopped",
    "disk.resting",
    "locked_memory.remedy",
    "umount_needs_coordlfs",
}  # exported in a form of their own, or words


def scrape(url: str) -> dict[tuple[str, str], float]:
    """Every sample, by its name and the value of its labels but the mountpoint."""
    with urllib.request.urlopen(url, timeout=20) as reply:
        text = reply.read().decode()
    return {
        (sample.name, ",".join(v for k, v in sorted(sample.labels.items()) if k != "mountpoint")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("9500", ("127.0.0.1", 9500)),
        (":9500", ("127.0.0.1", 9500)),
        ("0.0.0.0:9500", ("0.0.0.0", 9500)),
        ("node7.local:1", ("node7.local", 1)),
        ("[::1]:9500", ("::1", 9500)),
    ],
)
def test_addresses(text: str, meant: tuple[str, int]) -> None:
    assert exporter.address(text) == meant


@pytest.mark.parametrize("text", ["", "x", "70000", "::1:9500", "host:", "-1", "1 2", "http://x:1"])
def test_what_is_no_address_is_bad_usage(text: str) -> None:
    with pytest.raises(UserError) as caught:
        exporter.address(text)
    assert caught.value.status == 2


def test_a_missing_library_is_told_in_one_line(tmp_path: Path) -> None:
    said = script(
        """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "prometheus_client" else find(name, *rest)
from coordlfs.commands.cli import main
sys.stderr = sys.stdout
print(main(["mount", sys.argv[1], sys.argv[1] + "/../mnt", "--metrics", "0"]))
""",
        tmp_path,
    ).splitlines()
    assert said == [
        "coordlfs: --metrics needs the package prometheus-client: pip install 'coordlfs[metrics]'",
        "1",
    ]


@pytest.fixture
def scraped(source: Path, place: Path, mount: MakeMount) -> tuple[Mount, str]:
    """A mount of ten files, with all that has figures; and where its metrics are."""
    write_files(source, 10, 10_000)
    done: list[str] = []
    disk = "--disk-cache", place / "disk", "--disk-size", "8M"
    mounted = mount(source, "10M", "--metrics", "0", *disk, said=done.append)
    url = re.search(r"^metrics: (http://127\.0\.0\.1:\d+/metrics)$", "".join(done), re.MULTILINE)
    assert url is not None
    return mounted, url[1]


def leaves(figures: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every figure and its path."""
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


OF_OTHERS = "source.requests.", "dataset."  # what only a bucket has, and what only a pin


def test_everything_that_status_knows_is_exported(scraped: tuple[Mount, str]) -> None:
    mounted, url = scraped
    for _ in range(2):
        for name in os.listdir(mounted.path):
            read(mounted.path / name)
    figures = mounted.settle()
    listed = {path.split(".")[0] if path.split(".")[0] in EXPLAINED else path for path, value in leaves(figures)}
    unknown = listed - EXPLAINED - set(exporter.GAUGES) - set(exporter.COUNTERS)
    unknown -= {path for path, value in leaves(figures) if isinstance(value, str)}
    assert not unknown, f"{unknown} of Stats.collect() has no line in coordlfs/processes/exporter.py"
    found = scrape(url)
    info = f"{figures['residence']},{figures['source_path']},{figures['version']}"
    assert found["coordlfs_mount_info", info] == 1
    assert found["coordlfs_keepers", ""] == 1
    assert found["coordlfs_pinned_items", ""] == 10
    assert found["coordlfs_capacity_bytes", ""] == 10 * MIB
    assert found["coordlfs_source_bytes_total", ""] == 100_000
    assert found["coordlfs_requests_total", "read"] == figures["requests"]["read"]
    assert found["coordlfs_requests_total", "name"] >= figures["requests"]["name"]
    assert found["coordlfs_epochs_total", ""] == figures["epochs"]
    assert found["coordlfs_epoch_misses", "current"] == figures["epoch"]["misses"]
    assert found["process_resident_memory_bytes", ""] > MIB
    for table, end in ((exporter.GAUGES, ""), (exporter.COUNTERS, "_total")):
        ours = {path: written for path, (written, _) in table.items() if not path.startswith(OF_OTHERS)}
        names = {written.partition("{")[0] for written in ours.values()}
        missing = {f"coordlfs_{name}{end}" for name in names} - {name for name, _ in found}
        of_pins = {name for name in missing if name.startswith("coordlfs_dataset_")}  # tests/mount/test_pin_places.py
        assert missing - of_pins <= {"coordlfs_hit_ratio", "coordlfs_locked_memory_limit_bytes"}


def test_the_next_server_answers_at_the_same_port(scraped: tuple[Mount, str]) -> None:
    mounted, url = scraped
    mounted.expect_errors = True
    read(mounted.path / "item-00000")
    mounted.settle()
    before = scrape(url)
    os.kill(mounted.processes["server"], signal.SIGKILL)
    after = scrape(url)  # waits for the next server in the backlog
    assert after["coordlfs_start_time_seconds", ""] > before["coordlfs_start_time_seconds", ""]
    assert after["coordlfs_source_bytes_total", ""] == before["coordlfs_source_bytes_total", ""]


def test_clients_that_send_nonsense_or_nothing_stop_nobody(scraped: tuple[Mount, str]) -> None:
    mounted, url = scraped
    port = int(url.rpartition(":")[2].partition("/")[0])
    idle = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(8)]
    try:
        for line in (b"\0" * 100, b"GET", b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"A" * 100_000):
            with socket.create_connection(("127.0.0.1", port), 5) as sock, suppress(OSError):
                sock.sendall(line)
                sock.shutdown(socket.SHUT_WR)
        read(mounted.path / "item-00000")
    finally:
        for sock in idle:
            sock.close()
    eventually(lambda: scrape(url)["coordlfs_source_files_total", ""] == 1)
    with suppress(urllib.error.HTTPError):
        urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=20)
    assert mounted.stats()["processes"]["server"] == mounted.processes["server"]


@pytest.mark.usefixtures("_may_mount")
def test_a_port_in_use_is_told_before_anything_is_mounted(source: Path, place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = coordlfs("mount", source, place / "mnt", "--metrics", port, status=1)
    assert done.stderr.startswith(f"coordlfs: --metrics {port}: port {port} of 127.0.0.1 cannot be had")
    assert len(done.stderr.splitlines()) == 1
    assert not (place / "mnt").exists()


@pytest.mark.usefixtures("_may_mount")
def test_run_serves_metrics_to_its_command(source: Path) -> None:
    write_files(source, 2, 100)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    fetch = f"import urllib.request as r; print(r.urlopen('http://127.0.0.1:{port}/metrics').read().decode())"
    command = f'cat {source}/item-00000 >/dev/null && exec {sys.executable} -c "{fetch}"'
    done = coordlfs("run", source, "--cache-size", "1M", "--metrics", port, "--", "sh", "-c", command)
    assert f'coordlfs_source_files_total{{mountpoint="{source}"}} 1.0' in done.stdout


def test_the_dashboard_shows_metrics_that_exist() -> None:
    dashboard = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = set(re.findall(r"coordlfs_\w+", " ".join(expressions)))
    named = {f"coordlfs_{written.partition('{')[0]}" for written, _ in [*exporter.GAUGES.values()]}
    named |= {f"coordlfs_{written.partition('{')[0]}_total" for written, _ in exporter.COUNTERS.values()}
    named |= {f"coordlfs_{name}" for name, _ in exporter.EPOCH.values()}
    assert len(shown) > 10
    assert shown <= named
