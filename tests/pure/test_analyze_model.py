"""The model of a job, and what is advised: true at the measured points, and going the right way between them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from coordlfs_tools.analyze.model import TODAY, Change, Job, enough_cache, enough_workers, predict
from coordlfs_tools.analyze.whatif import WORTH, advise, curves, page_cache_hits
from hypothesis import given
from hypothesis import strategies as st

SHARES = st.floats(0, 1)
SLACK = 1 + 1e-9


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    """Jobs as they could have been measured."""
    workers = draw(st.integers(0, 16))
    size = draw(st.floats(1e3, 1e7))
    ingestion, prep, storage = (draw(st.floats(10, 1e5)) for _ in range(3))
    together = min(prep, storage)
    serial = 1 / (1 / prep + 1 / storage / max(workers, 1))
    fetch = draw(st.floats(min(serial, together), together))

    def load(rate: float) -> float:
        return 1 / ingestion + 1 / rate if workers == 0 else max(1 / ingestion, 1 / rate)

    noise = draw(st.floats(1, 1.3))
    cores = draw(st.integers(1, 64))
    return Job(
        ingestion=ingestion,
        prep=prep,
        fetch=fetch,
        storage=storage * size,
        storage_most=storage * size * draw(st.floats(1, 4)),
        latency=draw(st.floats(0, 1)) * max(workers, 1) / storage,
        seconds_cold=load(fetch) * noise,
        seconds_warm=load(prep) * noise,
        sample_bytes=size,
        samples=draw(st.integers(1, 10**7)),
        workers=workers,
        cpu_seconds=draw(st.sampled_from([0.0, 0.3, 1.0])) * min(cores, max(workers, 1)) / prep,
        cores=cores,
    )


@given(jobs())
def test_at_the_measured_points_it_says_what_was_measured(job: Job) -> None:
    assert predict(job, 1).seconds == pytest.approx(job.seconds_warm * job.samples)
    assert predict(job, 0).seconds == pytest.approx(job.seconds_cold * job.samples, rel=1e-6)


@given(jobs(), SHARES, st.integers(1, 32), st.floats(0.1, 10), st.floats(0.1, 10), st.integers(1, 8))
def test_shares_are_shares(job: Job, cached: float, workers: int, storage: float, gpu: float, n: int) -> None:
    for change in (Change(workers, storage, gpu), Change(jobs=n), Change(nodes=n, partitioned=True)):
        prediction = predict(job, cached, change)
        assert prediction.prep_share >= -1e-9
        assert prediction.fetch_share >= -1e-9
        assert prediction.stall_share <= SLACK
        assert 0 < prediction.seconds < float("inf")


@given(jobs(), SHARES, SHARES, st.integers(2, 8))
def test_more_of_anything_is_never_slower(job: Job, a: float, b: float, n: int) -> None:
    calm = replace(job, seconds_cold=predict(job, 0).seconds / job.samples)
    cached = min(a, b)
    now = predict(calm, cached).seconds
    assert predict(calm, cached, Change(storage=n)).seconds <= now * SLACK
    assert predict(calm, cached, Change(gpu=n)).seconds <= now * SLACK
    assert predict(calm, cached, Change(workers=max(job.workers, 1) + n)).seconds <= now * SLACK
    apart, together = (predict(calm, cached, Change(jobs=n, coordinated=c)).seconds for c in (False, True))
    assert together <= apart * SLACK
    assert now <= apart * SLACK


def _ideal(ingestion: float, prep: float, storage: float, workers: int = 8) -> Job:
    """A job that overlaps everything: samples of 1 byte, so that bytes/s are samples/s."""
    fetch = min(prep, storage)
    warm, cold = max(1 / ingestion, 1 / prep), max(1 / ingestion, 1 / fetch)
    return Job(ingestion, prep, fetch, storage, storage, 0.0, cold, warm, 1.0, 1000, workers, cores=workers)


@given(st.floats(10, 1e4), st.floats(10, 1e4), st.floats(10, 1e4), SHARES)
def test_a_pipeline_that_overlaps_is_as_fast_as_its_slowest_stage(g: float, p: float, s: float, x: float) -> None:
    job = _ideal(g, p, s)
    assert predict(job, x).throughput == pytest.approx(min(g, p, s / (1 - x) if x < 1 else p), rel=1e-6)


def test_a_loop_that_loads_by_itself_overlaps_nothing() -> None:
    job = replace(_ideal(100, 100, 1e9), workers=0, seconds_warm=0.02, seconds_cold=0.02)
    assert predict(job, 1).throughput == pytest.approx(50)
    assert predict(job, 1).prep_share == pytest.approx(0.5)


def test_partitioned_caches_add_up() -> None:
    job = _ideal(1e4, 1e4, 100)
    alone = predict(job, 0.25, Change(nodes=4))
    shared = predict(job, 0.25, Change(nodes=4, partitioned=True))
    assert shared.fetch_share < 0.01 < alone.fetch_share
    assert alone.seconds == pytest.approx(predict(job, 0.25).seconds / 4)


def test_no_more_cache_and_workers_than_it_takes() -> None:
    job = _ideal(200, 1000, 100)  # half of the dataset from storage is as fast as the GPU
    assert enough_cache(job, lambda share: share) == pytest.approx(0.5, abs=0.02)
    assert enough_workers(replace(job, ingestion=500.0, workers=8), 1.0, 16) == 4


def test_the_page_cache_finds_less_than_it_holds() -> None:
    assert page_cache_hits(0) == 0
    assert page_cache_hits(1) == page_cache_hits(3) == 1
    for share in (0.2, 0.5, 0.8):
        assert 0 <= page_cache_hits(share) < share


def test_advice() -> None:
    waits = _ideal(1000, 1000, 100)
    advice = advise(waits, memory=600)  # of 1000 bytes
    assert advice.helps
    assert advice.cached == pytest.approx(0.36, abs=0.02)  # 60 % of the memory
    assert advice.gain > 1.1
    assert not advise(waits, memory=2000).helps  # the page cache holds everything
    keeps_up = advise(replace(waits, ingestion=200.0, seconds_warm=1 / 200), memory=900)
    assert not keeps_up.helps
    assert "page cache finds" in keeps_up.why
    computes = advise(_ideal(10, 1000, 100), memory=500)
    assert not computes.helps
    assert "does not wait" in computes.why


def test_a_disk_is_advised_where_memory_is_too_small() -> None:
    waits = _ideal(100, 1000, 10)
    advice = advise(waits, memory=600)  # of 1000 bytes
    assert advice.disk_bytes == pytest.approx((0.9 - 0.36) * 1000 * 1.05, abs=30)  # a tenth may be fetched beside
    assert advice.with_disk.seconds < advice.mounted.seconds / (1 + WORTH)
    assert advise(waits, memory=2000).disk_bytes == 0  # memory holds everything
    assert advise(_ideal(10, 1000, 100), memory=500).disk_bytes == 0  # it does not wait for storage


@given(jobs(), st.integers(0, 10**13))
def test_what_is_advised_is_never_worse_and_fits(job: Job, memory: int) -> None:
    advice = advise(job, memory)
    assert advice.cache_bytes <= max(memory * 0.6, 0) * SLACK
    assert advice.helps == (advice.gain >= 1 + WORTH)
    assert advice.with_disk.seconds <= min(advice.today.seconds, advice.mounted.seconds) * SLACK
    assert advice.cache_bytes + advice.disk_bytes / 1.05 <= job.dataset_bytes * SLACK + 1
    for curve in curves(job, memory):
        for points in curve.lines.values():
            assert [x for x, _ in points] == sorted(x for x, _ in points)


def test_today_changes_nothing() -> None:
    assert Change() == TODAY
