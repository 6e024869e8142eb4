"""Figures as a picture that needs no text beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import fill
from typing import Final, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from ebpfstream.bench.measuring import SERIES, Figures, Kind, Policy
from ebpfstream.bench.plan import Sweep
from ebpfstream.bench.results import Result, Results, size, time

COLOURS: Final[dict[Kind, str]] = {"ring": "#1f6fb4", "perf": "#d95f02"}
_STYLES: Final[dict[Policy, tuple[Literal[":", "-.", "-", "--"], str]]] = {  # line, marker
    "each": (":", "o"),
    "forced": ("-.", "x"),
    "gathered": ("-", "s"),
    "watermark": ("--", "^"),
}
_LABELS: Final[dict[Policy, str]] = {
    "each": "woken at once (the kernel's default)",
    "forced": "wakeup forced for each event",
    "gathered": "gathered by latency budget (this library's default)",
    "watermark": "woken at a fixed watermark",
}


_OFFERED: Final = "offered events each second (last point: the limit)"
_DELIVERED: Final = "delivered events each second (more is better)"


def draw(results: Results, path: Path) -> None:
    """Write the picture, in the format that the file's name ends in: .png or .svg."""
    figure = Figure(figsize=(17, 11))
    FigureCanvasAgg(figure)
    rates, sizes, buffers, half, nearly_all, producers = figure.subplots(2, 3).flat
    _rates(rates, results)
    _sizes(sizes, results)
    _buffers(buffers, results)
    _latency(half, results, "Half of the events come within this time (p50)", lambda figures: figures.p50)
    _latency(
        nearly_all, results, "99 % of the events come within this time (p99)", lambda figures: figures.p99
    )
    _producers(producers, results)
    _legend(figure)
    figure.suptitle(
        "BPF ring buffer and perf buffer: the same events, by wakeup policy (median; shaded: least to most)",
        fontsize=16,
    )
    _notes(figure, results)
    figure.tight_layout(rect=(0, 0.12, 1, 0.98), h_pad=2.5, w_pad=2)
    figure.savefig(path, dpi=110)


def _rates(axes: Axes, results: Results) -> None:
    title = "How much is lost, by rate\n64-byte events, 256 KiB buffer, one producer"
    _lost(axes, results, results.plan.rates, title, _OFFERED)


def _sizes(axes: Axes, results: Results) -> None:
    sweep = results.plan.sizes
    _curves(axes, results, sweep, lambda figures: figures.delivered_rate)
    _label(
        axes,
        "How many events come through, by size\n4 MiB buffer, one producer that never stops",
        "bytes of an event",
        _DELIVERED,
    )
    _ticks_at_sizes(axes, sweep)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: count(rate)))
    axes.yaxis.set_minor_formatter(FuncFormatter(between))


def _buffers(axes: Axes, results: Results) -> None:
    sweep = results.plan.buffers
    title = "How much is lost, by size of the buffer\n64-byte events, one producer that never stops"
    _lost(axes, results, sweep, title, "size of the buffer, of all CPUs together")
    _ticks_at_sizes(axes, sweep)


def _ticks_at_sizes(axes: Axes, sweep: Sweep) -> None:
    axes.set_xticks(sweep.points, [size(point) for point in sweep.points])
    axes.minorticks_off()


def _latency(axes: Axes, results: Results, what: str, get: Callable[[Figures], float]) -> None:
    _curves(axes, results, results.plan.rates, get)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda latency, _: time(latency)))
    title = f"{what}\n64-byte events, 256 KiB buffer, one producer"
    _label(axes, title, _OFFERED, "until the reader has it (less is better)")


def _notes(figure: Figure, results: Results) -> None:
    """Where it was measured, and how."""
    machine = results.machine
    notes = ", ".join(
        f"{name} {machine[name]}" for name in ("processor", "kernel", "python", "ebpfstream", "load")
    )
    figure.text(
        0.5, 0.012, fill(f"{notes}.  {results.method()}", 210), ha="center", fontsize=8, color="#555555"
    )


def _curves(axes: Axes, results: Results, sweep: Sweep, get: Callable[[Figures], float]) -> None:
    """A curve for each series, with the spread of the rounds around it."""
    for kind, policy in SERIES:
        points = [results.of(sweep.case(point, (kind, policy))) for point in sweep.points]
        if sweep.varied == "rate":
            points.sort(key=lambda result: result.median.offered_rate)
        places = [_place(sweep, result) for result in points]
        line, marker = _STYLES[policy]
        axes.plot(places, [get(result.median) for result in points], line, marker=marker, color=COLOURS[kind])
        bounds = [[get(choose) for choose in (result.least, result.most)] for result in points]
        least, most = zip(*bounds, strict=True)
        axes.fill_between(places, least, most, color=COLOURS[kind], alpha=0.08, linewidth=0)
    axes.set_xscale("log")
    if sweep.varied == "rate":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: count(rate)))
    axes.grid(alpha=0.3)


def _place(sweep: Sweep, result: Result) -> float:
    return result.median.offered_rate if sweep.varied == "rate" else getattr(result.case, sweep.varied)


def _lost(axes: Axes, results: Results, sweep: Sweep, title: str, below: str) -> None:
    _curves(axes, results, sweep, lambda figures: 100 * figures.lost_part)
    top = max(axes.get_ylim()[1], 10)
    axes.set_ylim(-0.03 * top, min(top, 103))
    _label(axes, title, below, "% of the events lost (less is better)")


def _producers(axes: Axes, results: Results) -> None:
    """Bars."""
    sweep = results.plan.producers
    for index, point in enumerate(sweep.points):
        for place, (kind, policy) in enumerate(SERIES):
            result = results.of(sweep.case(point, (kind, policy)))
            axes.bar(
                place + 0.4 * index,
                result.median.delivered_rate,
                0.38,
                color=COLOURS[kind],
                alpha=1 if index else 0.55,
                yerr=[
                    [result.median.delivered_rate - result.least.delivered_rate],
                    [result.most.delivered_rate - result.median.delivered_rate],
                ],
                ecolor="#444444",
            )
    axes.set_xticks(
        [place + 0.2 for place in range(len(SERIES))],
        [f"{kind}\n{policy}" for kind, policy in SERIES],
        fontsize=7,
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: count(rate)))
    axes.grid(alpha=0.3, axis="y")
    _label(
        axes,
        "One producer (pale) and two (full) that never stop\n64-byte events, 4 MiB buffer",
        "",
        _DELIVERED,
    )


def _label(axes: Axes, title: str, below: str, beside: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(below)
    axes.set_ylabel(beside)


def _legend(figure: Figure) -> None:
    handles = [
        Line2D(
            [],
            [],
            linestyle=_STYLES[policy][0],
            marker=_STYLES[policy][1],
            color=COLOURS[kind],
            label=f"{kind}: {_LABELS[policy]}",
        )
        for kind, policy in sorted(SERIES, reverse=True)  # of one kind together
    ]
    place = (0.5, 0.062)
    figure.legend(
        handles=handles, loc="lower center", bbox_to_anchor=place, ncols=4, frameon=False, fontsize=9
    )


def between(number: float, _: object = None) -> str:
    """For the small ticks of a logarithmic axis: labels at 2 and 5."""
    return count(number) if f"{number:.0e}"[0] in "25" else ""


def count(number: float) -> str:
    """Events, in thousands or millions if there are so many."""
    for least, unit in ((1e6, "M"), (1e3, "k")):
        if number >= least:
            return f"{number / least:g} {unit}"
    return f"{number:g}"
