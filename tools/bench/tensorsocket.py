"""The companion loader against TensorSocket, which shares prep as well: the same data set and workers.

TensorSocket (https://github.com/itu-rad/tensorsocket) has one producer that holds an ordinary DataLoader; jobs get
their batches from it.
"""

from __future__ import annotations

from importlib.util import find_spec
from statistics import median

from coordlfs_tools.bench import dataset, survival
from coordlfs_tools.bench.loader import epoch_of, measured, milliseconds
from coordlfs_tools.bench.loader_job import CONSUMER, COORDINATED, PHOTOS, Spec
from coordlfs_tools.bench.report import Bound, Context, Figure, alternate, ratios
from coordlfs_tools.lab.errors import LabError

_ROUNDS = 3
_JOBS = 4
_BATCHES = 32


def measure(context: Context) -> list[Figure]:
    """Samples a second and CPU seconds per sample of 4 jobs; and what each side survives is shown."""
    if find_spec("tensorsocket") is None:
        raise LabError("TensorSocket is not installed: pip install 'coordlfs[bench]'")
    photos = dataset.photographs(context.directory, 60 if context.quick else 400)
    spec = Spec("", PHOTOS, samples=0, batch=8 if context.quick else 64, workers=1, root=str(photos))
    spec = epoch_of(spec, _BATCHES, quick=context.quick, least=3 * _JOBS)
    cpu: dict[str, list[float]] = {COORDINATED: [], CONSUMER: []}
    names = {"coordlfs": COORDINATED, "TensorSocket": CONSUMER}
    rates = alternate(
        context,
        context.rounds(_ROUNDS),
        {name: measured(side, spec, _JOBS, _JOBS, cpu[side]) for name, side in names.items()},
    )
    context.console.print(survival.table())
    ours, theirs = rates["coordlfs"], rates["TensorSocket"]
    workers = f"{_JOBS} jobs, {_JOBS} workers in all"
    return [
        Figure(
            f"{workers}: samples/s ÷ TensorSocket's",
            ratios(ours, theirs),
            Bound(1, at_least=True),
            f"{median(ours):,.0f} ÷ {median(theirs):,.0f} samples/s",
        ),
        Figure(
            "… CPU seconds per delivered sample ÷ TensorSocket's",
            ratios(cpu[COORDINATED], cpu[CONSUMER]),
            Bound(1),
            f"{milliseconds(cpu[COORDINATED])} ÷ {milliseconds(cpu[CONSUMER])}",
        ),
    ]
