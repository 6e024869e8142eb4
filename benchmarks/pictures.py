"""What the benchmarks found as pictures that say it without the text around them.

`python benchmarks/pictures.py [FOLDER]` draws FOLDER/pictures/*.png from FOLDER/*.json (build/bench), which
`make bench` does at its end.  Titles are made of the figures, so that they cannot say anything else.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.peers.catalogue import FLOOR
from ebpfstream.bench.measuring import Kind
from ebpfstream.bench.picture import COLOURS, between, count
from ebpfstream.bench.results import size, time
from ebpfstream.stream import LATENCY

DRAWN: Final = {"peers": "peers.png", "buffers": "buffers.png"}
_OURS: Final = COLOURS["ring"]
_OTHERS: Final = "#a7a9ac"
_TEXT: Final = "#333333"

Found = dict[str, Any]
Series = tuple[Kind, str]  # a kind of buffer, a policy of wakeups
Results = dict[str, list[dict[str, float]]]


def draw(folder: Path) -> list[str]:
    """Each picture for which there is something; why there is none of the others."""
    ways: dict[str, Callable[[Found], Figure]] = {"peers": _peers, "buffers": _buffers}
    problems = []
    (folder / "pictures").mkdir(exist_ok=True)
    for name, way in ways.items():
        path, source = folder / "pictures" / DRAWN[name], folder / f"{name}.json"
        path.unlink(missing_ok=True)
        if not source.exists():
            continue
        try:
            figure = way(json.loads(source.read_text()))
        except (KeyError, ValueError, IndexError) as error:  # of peers that are missing
            problems.append(f"{name}: {error!r} is not among what was found")
            continue
        _save(figure, path)
    return problems


def _save(figure: Figure, path: Path) -> None:
    """As PNG of few colours: these files are committed."""
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(numpy.asarray(canvas.buffer_rgba()))
    picture.convert("RGB").quantize(64).save(path, optimize=True)


def _figure(title: str, found: Found, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=100)
    figure.suptitle(title, fontsize=13, weight="bold", color=_TEXT)
    machine = found["machine"]
    told = ("processor", "kernel", "python", "BCC", "libbpf", "bpftrace", "ebpfstream")
    notes = ", ".join(f"{name} {machine[name]}" for name in told if name in machine)
    figure.text(0.5, 0.012, notes, ha="center", fontsize=8, color="#777777")
    return figure


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10.5, loc="left", color=_TEXT)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


# --- Peers ---


_READ: Final = {  # the first is what others are compared with
    "BCC, a callback for each": "BCC callback, {kind}",
    "libbpf in C, counting": "libbpf C, counting, {kind}",
    "async for": "ebpfstream async for, {kind}",
    "batches()": "ebpfstream batches, {kind}",
    "to_numpy()": "ebpfstream numpy, {kind}",
}
_WRITTEN: Final = {
    "BCC + json.dumps": "BCC callback, JSON, {kind}",
    "bpftrace -f json (perf)": "bpftrace -f json, perf",
    "libbpf in C + stdio": "libbpf C, JSON by stdio, {kind}",
    "forward() to a file": "ebpfstream JSON, {kind}",
}


def _peers(found: Found) -> Figure:
    results: Results = found["results"]
    figure = _figure(
        "ebpfstream (blue) beside BCC, libbpf and bpftrace: how many 64-byte events each takes from a producer\n"
        "that never stops, and the CPU time of an event at rates that all can follow",
        found,
        13,
        9.4,
    )
    places = iter(figure.subplots(3, 2, gridspec_kw={"height_ratios": [5, 4, 7]}).flat)
    for kind in ("ring", "perf"):
        _bars(next(places), results, _READ, kind, "async for")
    for kind in ("ring", "perf"):
        _bars(next(places), results, _WRITTEN, kind, "forward() to a file")
    _costs(next(places), results, "ring")
    _costs(next(places), results, "perf")
    figure.tight_layout(rect=(0, 0.03, 1, 0.99), h_pad=2, w_pad=2)
    return figure


def _median(results: Results, name: str, figure: str) -> float:
    return statistics.median(one[figure] for one in results[name] if figure in one)


def _ratio(results: Results, over: str, under: str, figure: str) -> float:
    """Within each round, as everywhere."""
    return statistics.median(
        one[figure] / other[figure]
        for one, other in zip(results[over], results[under], strict=True)
        if figure in one and figure in other
    )


def _bars(axes: Axes, results: Results, bars: dict[str, str], kind: str, told: str) -> None:
    """Rates, each beside the first; `told` is the one that the title tells of."""
    names = {label: name.format(kind=kind) for label, name in bars.items()}
    first, first_name = next(iter(names.items()))
    top = 0.0
    for place, (label, name) in enumerate(names.items()):
        rates = [one["rate"] for one in results[name] if "rate" in one]
        rate, most = statistics.median(rates), max(rates)
        top = max(top, most)
        ours = name.startswith("ebpfstream")
        axes.barh(place, rate, 0.66, color=_OURS if ours else _OTHERS)
        axes.plot([min(rates), most], [place, place], color="black", linewidth=1.2)
        times = "" if label == first else f", {_ratio(results, name, first_name, 'rate'):.2g} times"
        axes.text(
            most,
            place,
            f"  {_short(rate)}/s{times}",
            va="center",
            fontsize=9.5,
            weight="bold" if ours else "normal",
            color=_TEXT,
        )
    axes.set_yticks(range(len(names)), list(names), fontsize=9.5)
    for label, tick in zip(names.values(), axes.get_yticklabels(), strict=True):
        tick.set_color(_OURS if label.startswith("ebpfstream") else _TEXT)
    axes.invert_yaxis()
    axes.set_xlim(0, top * 1.5)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    times = f"{_ratio(results, names[told], first_name, 'rate'):.2g}"
    if bars is _READ:
        _plain(axes, f"{kind.capitalize()} buffer: {told} reads {times} times the events that BCC does")
    else:
        _plain(axes, f"{kind.capitalize()} buffer: {times} times the JSON lines of BCC + json.dumps")


_LINES: Final = {
    "BCC's callback": ("BCC callback, {kind}", "#777777", "-", "o"),
    "C that counts": ("libbpf C, counting, {kind}", "#777777", ":", "x"),
    "ebpfstream, async for": ("ebpfstream async for, {kind}", _OURS, "-", "s"),
    "asyncio's timer of 2 ms alone": (FLOOR.name, "#111111", "--", ""),
}
_RATES: Final = (1_000, 10_000, 100_000)


def _costs(axes: Axes, results: Results, kind: str) -> None:
    """CPU time of an event against the rate."""
    ends = []
    for label, (name, colour, line, marker) in _LINES.items():
        name = name.format(kind=kind)
        if not any(results.get(name, [])):
            continue
        costs = [_median(results, name, f"cpu_{rate}") for rate in _RATES]
        axes.plot(_RATES, costs, line, marker=marker, color=colour, linewidth=1.6)
        ends.append((_RATES[-1], costs[-1], label, colour))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(_RATES[0] * 0.8, _RATES[-1] * 7)
    _label_ends(axes, ends)
    axes.set_xticks(_RATES, [count(rate) for rate in _RATES])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda cost, _: f"{cost:g} µs"))
    axes.grid(alpha=0.3)
    axes.set_xlabel("events each second", fontsize=9)
    axes.set_ylabel("CPU time for each event (less is better)", fontsize=9)
    ours, bcc = f"ebpfstream async for, {kind}", f"BCC callback, {kind}"
    slow, fast = (_ratio(results, ours, bcc, f"cpu_{rate}") for rate in (_RATES[0], _RATES[-1]))
    _plain(
        axes, f"{kind.capitalize()}: {slow:.2g} times BCC's CPU time at 1 k/s, {fast:.2g} times at 100 k/s"
    )


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names at the right of lines that end at x, y (x, y, name, colour), apart where they would lie on one another.

    Called when the axes have their limits.
    """
    height = 0.07  # of the axes, for a name
    to_parts = axes.transData + axes.transAxes.inverted()
    points = sorted((float(to_parts.transform(end[:2])[1]), *end) for end in ends)
    right = max(float(to_parts.transform(end[:2])[0]) for end in ends) + 0.06
    groups: list[list[float]] = []  # of names that touch; each lies around the middle of its points
    for y, *_ in points:
        groups.append([y])
        while len(groups) > 1 and _middle(groups[-1]) - _middle(groups[-2]) < height / 2 * (
            len(groups[-1]) + len(groups[-2])
        ):
            last = groups.pop()
            groups[-1] += last
    heights = [
        max(_middle(group) - height * (len(group) - 1) / 2, 0.04) + height * index
        for group in groups
        for index in range(len(group))
    ]
    for (_, x, y, label, colour), place in zip(points, heights, strict=True):
        axes.annotate(
            label,
            (x, y),
            xytext=(right, place),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.35, "linewidth": 0.8},
        )


def _middle(values: list[float]) -> float:
    return sum(values) / len(values)


def _short(rate: float) -> str:
    """Three digits."""
    return f"{rate / 1e6:.2f} M" if rate >= 1e6 else f"{rate / 1e3:.0f} k"


# --- Buffers ---


_POLICIES: Final = {
    "gathered": ("-", "s", "gathered"),
    "each": (":", "o", "at once"),
}
_BASE: Final = {"size": 64, "rate": 0, "buffer_size": 4 << 20, "producers": 1}
_SMALL: Final = 256 << 10
_SERIES: Final[list[Series]] = [(kind, policy) for policy in _POLICIES for kind in COLOURS]


def _buffers(found: Found) -> Figure:
    figure = _figure(
        "BPF ring buffer and perf buffer, read by ebpfstream: events gathered for "
        f"{LATENCY * 1e3:g} ms (its default), or read at once "
        "(the kernel's wakeups)",
        found,
        16,
        5.2,
    )
    losses, sizes, latencies = figure.subplots(1, 3)
    cases = found["cases"]
    by_rate = {
        series: sorted(_sweep(cases, *series, "rate", buffer_size=_SMALL), key=_offered) for series in _SERIES
    }
    _losses(losses, by_rate)
    _sizes(sizes, {series: _sweep(cases, *series, "size") for series in _SERIES})
    _latencies(latencies, by_rate)
    figure.tight_layout(rect=(0, 0.04, 1, 0.98), w_pad=2.5)
    return figure


def _sweep(cases: list[Found], kind: str, policy: str, varied: str, **given: int) -> list[Found]:
    """The cases in which nothing else varies."""
    wanted = {**_BASE, **given, "kind": kind, "policy": policy}
    del wanted[varied]
    return [case for case in cases if wanted.items() <= case.items()]


def _losses(axes: Axes, by_rate: dict[Series, list[Found]]) -> None:
    def lost(figures: Found) -> float:
        return 100 * float(figures["lost_part"])

    _curves(axes, by_rate, _offered, lost)
    axes.set_ylim(-0.4, max(10.0, axes.get_ylim()[1]))
    axes.set_ylabel("% of the events lost (less is better)")
    _finish(axes, by_rate, _offered, lost)
    limit = {kind: by_rate[kind, "gathered"][-1] for kind in COLOURS}
    said = ", ".join(
        f"{kind} {lost(case['median']):.2g} % of {_short(_offered(case))}/s" for kind, case in limit.items()
    )
    _plain(axes, f"Gathered, a producer that never stops loses\n{said} (64 bytes, 256 KiB)")


def _sizes(axes: Axes, by_size: dict[Series, list[Found]]) -> None:
    _curves(axes, by_size, lambda case: case["size"], _delivered)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: count(rate)))
    axes.yaxis.set_minor_formatter(FuncFormatter(between))
    axes.set_ylabel("events delivered each second (more is better)")
    _finish(axes, by_size, lambda case: case["size"], _delivered)
    points = [case["size"] for case in by_size["ring", "gathered"]]
    axes.set_xticks(points, [size(point) for point in points])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("bytes of an event")
    gathered, each = (
        statistics.median(
            _delivered(one) / _delivered(other)
            for one, other in zip(*(_of_64(by_size[kind, policy])["rounds"] for kind in COLOURS), strict=True)
        )
        for policy in ("gathered", "each")
    )
    _plain(
        axes,
        f"The ring takes {gathered:.2g} times perf's events, gathered,\n"
        f"and {each:.2g} times, at once (64 bytes, 4 MiB)",
    )


def _latencies(axes: Axes, by_rate: dict[Series, list[Found]]) -> None:
    _curves(axes, by_rate, _offered, lambda figures: figures["p99"])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda latency, _: time(latency)))
    axes.set_ylabel("99 % of the events are read within (less is better)")
    _finish(axes, by_rate, _offered, lambda figures: figures["p99"])
    slowest = by_rate["ring", "gathered"][0], by_rate["ring", "each"][0]
    late, at_once = (time(case["median"]["p99"]) for case in slowest)
    _plain(
        axes,
        f"At {_short(_offered(slowest[0]))}/s 99 % of the ring's events come\n"
        f"within {late}, gathered, or {at_once}, at once",
    )


def _offered(case: Found) -> float:
    rate: float = case["median"]["offered_rate"]
    return rate


def _delivered(figures: Found) -> float:
    rate: float = figures["delivered_rate"]
    return rate


def _of_64(cases: list[Found]) -> Found:
    return next(case for case in cases if case["size"] == 64)


def _curves(
    axes: Axes,
    series: dict[Series, list[Found]],
    place: Callable[[Found], float],
    get: Callable[[Found], float],
) -> None:
    """Medians, with the spread of the rounds around them."""
    for (kind, policy), cases in series.items():
        line, marker, _ = _POLICIES[policy]
        places = [place(case) for case in cases]
        colour = COLOURS[kind]
        axes.plot(places, [get(case["median"]) for case in cases], line, marker=marker, color=colour)
        least, most = ([get(case[which]) for case in cases] for which in ("least", "most"))
        axes.fill_between(places, least, most, color=colour, alpha=0.1, linewidth=0)
    axes.set_xscale("log")
    axes.grid(alpha=0.3)


def _finish(
    axes: Axes,
    series: dict[Series, list[Found]],
    place: Callable[[Found], float],
    get: Callable[[Found], float],
) -> None:
    """Room for the names at the right, and the names."""
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** 0.36)
    if place is _offered:
        axes.set_xticks([10**power for power in range(3, 7)], ["1 k", "10 k", "100 k", "1 M"])
        axes.minorticks_off()
        axes.set_xlabel("events offered each second (last point: the limit)")
    _label_ends(
        axes,
        [
            (
                place(cases[-1]),
                get(cases[-1]["median"]),
                f"{kind}, {_POLICIES[policy][2]}",
                COLOURS[kind],
            )
            for (kind, policy), cases in series.items()
        ],
    )


if __name__ == "__main__":
    for problem in draw(Path(sys.argv[1] if len(sys.argv) > 1 else "build/bench")):
        print(problem)
