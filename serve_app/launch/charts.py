"""Charts as inline SVG, and the one HTML file that holds them: no script, nothing from elsewhere.

Colours are those of Okabe and Ito (2008), told apart by colour-blind people; lines differ by their dashes, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "12 4")
_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 12, 44
_ROW = 26
_NAMES = 150

Points = Sequence[tuple[float, float | None]]

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --bg: #fff; --ink: #16202b; --muted: #546374; --line: #d8dee6; }}
@media (prefers-color-scheme: dark) {{ :root {{ --bg: #0e141b; --ink: #e4ebf3; --muted: #9db0c3; --line: #2b3846; }} }}
body {{ margin: 0 auto; padding: 16px; max-width: 780px; background: var(--bg); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }}
h1 {{ font-size: 21px; }} h2 {{ font-size: 16px; margin: 26px 0 4px; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }} caption {{ text-align: left; color: var(--muted); }}
th, td {{ padding: 3px 10px 3px 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
.note {{ color: var(--muted); }} li {{ margin: 2px 0; }}
svg {{ width: 100%; height: auto; display: block; font: 12px system-ui, sans-serif; }}
svg text {{ fill: var(--ink); }} svg .axis {{ stroke: var(--line); }} svg .tick {{ fill: var(--muted); }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def page(title: str, parts: Iterable[str]) -> str:
    """One HTML file. `parts` are HTML already, the title is text."""
    return _PAGE.format(title=escape(title), body="\n".join(parts))


def heading(text: str) -> str:
    """A heading."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str) -> str:
    """A paragraph of text."""
    return f"<p>{escape(text)}</p>"


def notes(lines: Sequence[str]) -> str:
    """A list of text."""
    return '<ul class="note">' + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text; its first column names the rows."""
    head = "".join(f'<th scope="col">{escape(each)}</th>' for each in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def lines(
    title: str,
    series: Sequence[tuple[str, Points]],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    high: float | None = None,
) -> str:
    """A heading and lines over a common axis; a point without a value interrupts its line.

    On a logarithmic axis what is not above 0 is left out. `high` is the greatest value of the upright axis.
    """
    shown = [
        (name, [(x, y if y is not None and (y > 0 or not log_y) else None) for x, y in points if x > 0 or not log_x])
        for name, points in series
    ]
    known = [(x, y) for _, points in shown for x, y in points if y is not None]
    if not known:
        return heading(title) + paragraph("Nothing to show.")
    across = _Axis(min(x for x, _ in known), max(x for x, _ in known), _LEFT, _WIDTH - _RIGHT, log=log_x)
    low = min(y for _, y in known) if log_y else 0.0
    top = high if high is not None else max(y for _, y in known)
    up = _Axis(low, top, _HEIGHT - _BOTTOM, _TOP, log=log_y)
    legend_rows = -(-len(shown) // 3)
    drawn = [_grid(across, up, x_label, y_label)]
    for number, (name, points) in enumerate(shown):
        style = _style(number)
        for part in _unbroken(points):
            path = " ".join(f"{across.at(x):.1f},{up.at(y):.1f}" for x, y in part)
            drawn.append(f'<polyline points="{path}" fill="none" stroke-width="1.8" {style}/>')
        x, y = _LEFT + (number % 3) * 220, _HEIGHT + 12 + 18 * (number // 3)
        drawn.append(f'<line x1="{x}" x2="{x + 26}" y1="{y - 4}" y2="{y - 4}" stroke-width="2.5" {style}/>')
        drawn.append(f'<text x="{x + 32}" y="{y}">{escape(_short(name))}</text>')
    return _figure(title, _HEIGHT + 18 * legend_rows, drawn)


def bars(title: str, rows: Sequence[tuple[str, float, tuple[float, float] | None]], x_label: str) -> str:
    """A heading and a bar for each (name, value, bounds of its interval)."""
    ends = [max(value, bounds[1] if bounds else value) for _, value, bounds in rows]
    starts = [min(value, bounds[0] if bounds else value, 0.0) for _, value, bounds in rows]
    bottom = _TOP + _ROW * len(rows)
    across = _Axis(min(starts), max(*ends, 1e-9), _NAMES, _WIDTH - _RIGHT - 70)
    drawn = []
    for tick in across.ticks():
        x = across.at(tick)
        drawn.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        drawn.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{_number(tick)}</text>')
    for number, (name, value, bounds) in enumerate(rows):
        y = _TOP + _ROW * number
        left, right = sorted((across.at(0.0), across.at(value)))
        colour = COLOURS[number % len(COLOURS)]
        drawn.append(
            f'<rect x="{left:.1f}" y="{y + 4}" width="{max(right - left, 1):.1f}" height="{_ROW - 8}" fill="{colour}"/>'
        )
        drawn.append(f'<text x="{_NAMES - 8}" y="{y + 17}" text-anchor="end">{escape(_short(name))}</text>')
        end = right
        if bounds:
            a, b = across.at(bounds[0]), across.at(bounds[1])
            drawn.append(
                f'<line x1="{a:.1f}" x2="{b:.1f}" y1="{y + 13}" y2="{y + 13}" stroke="currentColor" stroke-width="2"/>'
            )
            end = max(end, b)
        drawn.append(f'<text x="{end + 6:.1f}" y="{y + 17}">{_number(value)}</text>')
    drawn.append(
        f'<text x="{(_NAMES + _WIDTH) / 2:.0f}" y="{bottom + 34}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return _figure(title, bottom + 40, drawn)


class _Axis:
    """From values to places on the drawing."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False) -> None:
        if not high > low:
            low, high = (low / 2, low * 2) if log else (low, low + max(abs(low), 1.0))
        self._log, self._start, self._end = log, start, end
        self._low, self._high = (math.log10(low), math.log10(high)) if log else (low, high)

    def at(self, value: float) -> float:
        """The place of a value; outside the axis, its nearest end."""
        place = (math.log10(value) if self._log else value) - self._low
        part = min(max(place / (self._high - self._low), 0.0), 1.0)
        return self._start + (self._end - self._start) * part

    def ticks(self) -> list[float]:
        """Round values to label."""
        if self._log:
            steps = (1,) if self._high - self._low > 3 else (1, 2, 5)
            decades = range(math.floor(self._low), math.ceil(self._high) + 1)
            values = [step * 10.0**decade for decade in decades for step in steps]
            return [v for v in values if self._low - 1e-9 <= math.log10(v) <= self._high + 1e-9]
        rough = (self._high - self._low) / 6.0
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough)
        first = math.ceil(self._low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self._high / step + 1e-9) + 1)]


def _grid(across: _Axis, up: _Axis, x_label: str, y_label: str) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    drawn = []
    for tick in up.ticks():
        y = up.at(tick)
        drawn.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in across.ticks():
        x = across.at(tick)
        drawn.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        drawn.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{_number(tick)}</text>')
    drawn.append(f'<text x="{(_LEFT + right) / 2:.0f}" y="{bottom + 34}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (_TOP + bottom) / 2
    drawn.append(
        f'<text x="14" y="{middle:.0f}" text-anchor="middle" transform="rotate(-90 14 {middle:.0f})">'
        f"{escape(y_label)}</text>"
    )
    return "".join(drawn)


def _figure(title: str, height: int, drawn: Sequence[str]) -> str:
    name = escape(title, quote=True)
    shapes = "".join(drawn)
    return f'{heading(title)}<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{name}">{shapes}</svg>'


def _style(number: int) -> str:
    return f'stroke="{COLOURS[number % len(COLOURS)]}" stroke-dasharray="{_DASHES[number % len(_DASHES)]}"'


def _unbroken(points: Points) -> list[list[tuple[float, float]]]:
    parts: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            parts.append([])
        else:
            parts[-1].append((x, y))
    return [[*part, *part] if len(part) == 1 else part for part in parts if part]


def _short(name: str) -> str:
    return name if len(name) <= 26 else name[:24] + ".."


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 or value != round(value) else f"{value:,.0f}"
