"""The report: one HTML file that needs nothing else, neither another file nor the network."""

from __future__ import annotations

import io
from typing import Any

from coordlfs_tools.analyze.words import STALLS, rate_rows, stall_rows
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from coordlfs.sizes import text

_COLOURS = {"compute": "#3b7d4f", "prep": "#e0a030", "fetch": "#b8433a"}
_LINES = ("#9a9a9a", "#1f5fa8")
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "svg.fonttype": "path",
}


def html(found: dict[str, Any]) -> str:
    """The page for what `result` found."""
    environment = Environment(
        loader=PackageLoader("coordlfs_tools.analyze", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        found=found,
        rates=rate_rows(found),
        stalls=stall_rows(found),
        bars=_drawn(_bars(found), "bars"),
        curves=_drawn(_curves(found), "curves"),
        text=text,
    )


def _drawn(figure: Figure, name: str) -> Markup:
    buffer = io.StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    words = buffer.getvalue()
    return Markup(words[words.index("<svg") :])


def _bars(found: dict[str, Any]) -> Figure:
    """Where the time of an epoch goes: cold, as it is today, with coordlfs."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 1.8), layout="constrained")
        axes = figure.add_subplot(xlabel="seconds for a steady epoch")
        samples = found["job"]["samples"] / found["job"]["batch"] / found["job"]["ranks"]
        cold = found["stalls"]["iteration_seconds"] * samples
        rows = [("nothing cached\n(measured)", cold, found["stalls"])]
        rows += [("page cache\n(today)", found["today"]["seconds"], found["today"])]
        label = "coordlfs" if found["advice"]["helps"] else "coordlfs\n(no gain)"
        rows += [(label, found["advice"]["epoch"]["seconds"], found["advice"]["epoch"])]
        for at, (_, seconds, shares) in enumerate(rows):
            left = 0.0
            parts = {"prep": shares["prep_share"], "fetch": shares["fetch_share"]}
            parts = {"compute": max(1 - sum(parts.values()), 0.0), **parts}
            for part, share in parts.items():
                width = share * seconds
                axes.barh(
                    at, width, left=left, color=_COLOURS[part], label=STALLS[part] if at == 0 else None, height=0.6
                )
                if share >= 0.08:
                    axes.text(left + width / 2, at, f"{share:.0%}", ha="center", va="center", color="white")
                left += width
        axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
        axes.invert_yaxis()
        axes.legend(ncols=3, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _curves(found: dict[str, Any]) -> Figure:
    """The epoch's length, and below it the share of it that is waiting, against everything that could be changed."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 4.7), layout="constrained")
        grid = figure.subplots(3, 2)
        for axes, (name, curve) in zip(grid.flat, found["what_if"].items(), strict=True):
            _curve(axes, name, curve, found)
    return figure


def _curve(axes: Axes, name: str, curve: dict[str, Any], found: dict[str, Any]) -> None:
    axes.set_title(curve["label"], pad=17)
    top = 0.0
    for (label, points), colour in zip(curve["lines"].items(), _LINES, strict=True):
        xs, ys = [p["x"] for p in points], [p["seconds"] for p in points]
        # The first is the wider, so that it is seen where both are the same.
        axes.plot(xs, ys, label=label, color=colour, linewidth=1.5 if top else 3.5)
        waits = [p["seconds"] * (p["prep_share"] + p["fetch_share"]) for p in points]
        axes.plot(xs, waits, color=colour, linewidth=1, linestyle=":")
        top = max(top, *ys)
    if name in ("jobs", "nodes"):
        first = next(iter(curve["lines"].values()))[0]
        today = first["x"], first["seconds"]
    else:
        today = curve["today"], found["today"]["seconds"]
    axes.plot(*today, "o", color="black", markersize=5, zorder=3)  # the caption says what it is
    if name in ("storage", "gpu"):
        axes.set_xscale("log", base=2)
        ticks = [p["x"] for p in next(iter(curve["lines"].values()))]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    elif name in ("workers", "jobs", "nodes"):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    elif name == "cache":
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.set_ylim(0, max(top * 1.1, 1e-9))
    axes.set_ylabel("epoch (s)")
    # Between title and curves: among the curves there is no place that is free in every report.
    axes.legend(ncols=2, frameon=False, fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    axes.grid(alpha=0.25)
