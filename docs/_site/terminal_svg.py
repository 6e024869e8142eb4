"""What a terminal showed as an SVG, which needs nothing beside itself: no script, no font."""

from __future__ import annotations

from html import escape
from typing import Any, Final, NamedTuple

WIDTH: Final = 8.4
"""Of a cell, in pixels."""
HEIGHT: Final = 18
MARGIN: Final = 14
TITLE: Final = 36

FOREGROUND: Final = "#d8dee9"
FONT: Final = "14px ui-monospace,'DejaVu Sans Mono',Menlo,Consolas,monospace"
BACKGROUND: Final = "#1e2430"
COLOURS: Final = {
    "black": "#4c566a",
    "red": "#e0717b",
    "green": "#a3be8c",
    "brown": "#ebcb8b",
    "blue": "#81a1c1",
    "magenta": "#b48ead",
    "cyan": "#88c0d0",
    "white": "#e5e9f0",
}


class Style(NamedTuple):
    """How characters look."""

    colour: str
    background: str
    bold: bool


Span = tuple[int, str, Style]
"""Where characters of one style begin, and they."""
Frame = tuple[tuple[Span, ...], ...]
"""A line of spans for each of the screen."""


def frame(screen: Any) -> Frame:
    """What a pyte screen shows now."""
    return tuple(_spans([screen.buffer[y][x] for x in range(screen.columns)]) for y in range(screen.lines))


def _spans(cells: list[Any]) -> tuple[Span, ...]:
    spans: list[Span] = []
    for column, cell in enumerate(cells):
        style = _style(cell)
        if spans and spans[-1][2] == style:
            begin, text, _ = spans[-1]
            spans[-1] = (begin, text + cell.data, style)
        else:
            spans.append((column, cell.data, style))
    return tuple(span for span in spans if span[1].strip() or span[2].background)


def _style(cell: Any) -> Style:
    colour, background = _colour(cell.fg) or FOREGROUND, _colour(cell.bg)
    if cell.reverse:
        colour, background = background or BACKGROUND, colour
    return Style(colour, background, cell.bold)


def _colour(name: str) -> str:
    plain = name.removeprefix("bright")
    return "" if name == "default" else COLOURS.get(plain, f"#{plain}")


def svg(title: str, frames: list[tuple[float, Frame]], seconds: float) -> str:
    """The picture; of several frames, each with the second at which it came, one after the other for ever."""
    used = max(y for _, shown in frames for y, line in enumerate(shown, 1) if line)
    columns = max(x + len(text.rstrip()) for _, shown in frames for line in shown for x, text, _ in line)
    columns = max(columns, len(title) + 2)
    width, height = round(columns * WIDTH + 2 * MARGIN), used * HEIGHT + TITLE + MARGIN
    lines: dict[tuple[Span, ...], str] = {}  # each once, however many frames have it
    drawn, rules = [], []
    for number, (begin, shown) in enumerate(frames):
        uses = []
        for y, line in enumerate(shown[:used]):
            if line:
                key = lines.setdefault(line, f"l{len(lines)}")
                uses.append(f'<use href="#{key}" y="{TITLE + y * HEIGHT}"/>')
        drawn.append(f'<g id="f{number}">{"".join(uses)}</g>')
        if len(frames) > 1:
            last = number == len(frames) - 1
            end = seconds if last else frames[number + 1][0]
            rules.append(
                _shown_between(number, begin / seconds * 100, end / seconds * 100, seconds, last=last)
            )
    defined = "".join(f'<g id="{key}">{_drawn(line)}</g>' for line, key in lines.items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">\n<title>{escape(title)}</title>\n'
        f"<style>g{{fill:{FOREGROUND}}}text{{font:{FONT};white-space:pre}}"
        f".b{{font-weight:bold}}\n{''.join(rules)}</style>\n<defs>{defined}</defs>\n"
        f'<rect width="{width}" height="{height}" rx="8" fill="{BACKGROUND}"/>\n'
        f'<text x="{MARGIN}" y="20" fill="{COLOURS["cyan"]}"># {escape(title)}</text>\n'
        + "\n".join(drawn)
        + "\n</svg>\n"
    )


def _shown_between(number: int, begin: float, end: float, seconds: float, *, last: bool) -> str:
    """Rules that show a frame in its time; whoever wants no motion sees the last one."""
    steps = "0%,100%{opacity:0}" if begin else ""
    steps += f"{begin:.2f}%{{opacity:1}}" + ("" if last else f"{end:.2f}%{{opacity:0}}")
    still = "" if last else f"@media(prefers-reduced-motion){{#f{number}{{opacity:0}}}}"
    moving = f"#f{number}{{animation:k{number} {seconds}s step-end infinite}}"
    return f"@keyframes k{number}{{{steps}}}@media(prefers-reduced-motion:no-preference){{{moving}}}{still}\n"


def _drawn(line: tuple[Span, ...]) -> str:
    parts = []
    for column, text, style in line:
        x = MARGIN + column * WIDTH
        if style.background:
            size = f'width="{len(text) * WIDTH:.1f}" height="{HEIGHT}"'
            parts.append(f'<rect x="{x:.1f}" y="0" {size} fill="{style.background}"/>')
        lead = len(text) - len(text.lstrip())
        if shown := text.strip():
            bold = ' class="b"' if style.bold else ""
            colour = "" if style.colour == FOREGROUND else f' fill="{style.colour}"'
            # Its length is given: fonts differ, columns must not.
            parts.append(
                f'<text x="{x + lead * WIDTH:.1f}" y="13"{bold}{colour} '
                f'textLength="{len(shown) * WIDTH:.1f}">{escape(shown, quote=False)}</text>'
            )
    return "".join(parts)
