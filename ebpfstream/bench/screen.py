"""Figures for a person at a terminal: progress while they are made, tables at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ebpfstream.bench.measuring import SERIES, Case, Figures
from ebpfstream.bench.plan import Sweep
from ebpfstream.bench.results import MEANINGS, Result, Results, size, time

_WIDTH: Final = 160  # where no terminal says how wide it is
_NAMES: Final = {"size": "bytes", "rate": "events/s", "buffer_size": "buffer", "producers": "producers"}
_COLUMNS: Final = (
    "kind",
    "wakeups",
    "offered k/s",
    "delivered k/s",
    "lost %",
    "CPU s/M\nproducer",
    "CPU s/M\nreader",
    "p50",
    "p99",
    "p99.9",
    "RSS\nMB",
    "wakeups\n1/s",
)


@contextmanager
def progress(total: int) -> Iterator[Callable[[Case | None], None]]:
    """Shows how far it is on standard error, if that is a terminal; called when a case begins."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Not refreshed by a thread: that would be measured, too.
    with Progress(
        *columns, console=console, disable=not console.is_terminal, auto_refresh=False, transient=True
    ) as bar:
        task = bar.add_task("", total=total)
        begun = 0

        def show(case: Case | None) -> None:
            nonlocal begun
            bar.update(task, completed=begun, description=_describe(case) if case else "", refresh=True)
            begun += 1

        yield show


def _describe(case: Case) -> str:
    rate = f"{case.rate}/s" if case.rate else "flood"
    described = (
        f"{case.kind} {case.policy}, {case.size} bytes, {rate}, {size(case.buffer_size)}, {case.producers}"
    )
    return f"{described} producer{'s' if case.producers > 1 else ''}"


def show(results: Results) -> None:
    """Write the tables to the standard output."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH
    for name, value in results.machine.items():
        console.print(f"{name:>10}  {value}", markup=False)
    console.print(f"\n{results.method()}\n", markup=False)
    for policy, meaning in MEANINGS.items():
        console.print(f"{policy:>10}  {meaning}", markup=False)
    for sweep in results.plan:
        console.print()
        console.print(_table(results, sweep))
    console.print(f"\n{results.conclusion()}", markup=False)


def _table(results: Results, sweep: Sweep) -> Table:
    table = Table(title=f"{sweep.title}: median (least to most)", title_justify="left")
    for name in (_NAMES[sweep.varied], *_COLUMNS):
        table.add_column(name, justify="left" if name in ("kind", "wakeups") else "right", overflow="fold")
    for point in sweep.points:
        for index, series in enumerate(SERIES):
            label = _point(sweep.varied, point) if not index else ""
            table.add_row(label, *_cells(results.of(sweep.case(point, series))))
        table.add_section()
    return table


def _cells(result: Result) -> tuple[str, ...]:
    middle = result.median
    return (
        result.case.kind,
        result.case.policy,
        _thousands(middle.offered_rate),
        _with_spread(result, _thousands, lambda figures: figures.delivered_rate),
        _with_spread(result, lambda part: f"{100 * part:.1f}", lambda figures: figures.lost_part),
        f"{middle.producer_cpu:.2f}",
        f"{middle.consumer_cpu:.2f}",
        time(middle.p50),
        time(middle.p99),
        time(middle.p999),
        f"{middle.resident:.0f}",
        f"{middle.wakeups:.0f}",
    )


def _with_spread(result: Result, text: Callable[[float], str], get: Callable[[Figures], float]) -> str:
    """The median, and the least and most if they look different."""
    middle, least, most = (text(get(figures)) for figures in (result.median, result.least, result.most))
    return middle if least == most else f"{middle} ({least} to {most})"


def _thousands(rate: float) -> str:
    return f"{rate / 1e3:.0f}" if rate >= 1e5 else f"{rate / 1e3:.3g}"


def _point(varied: str, point: int) -> str:
    if varied == "buffer_size":
        return size(point)
    return str(point) if point or varied != "rate" else "limit"
