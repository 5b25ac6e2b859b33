"""Small charts as inline SVG whose colours follow the page: text and axes take `currentColor`, series take CSS variables.

A page may define `--chart-1` ... `--chart-6`, `--chart-grid` and `--chart-surface`; without them the defaults below hold, so that a chart
also stands alone. No global matplotlib state is touched, nothing is fetched, and equal input gives equal SVG.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

Numbers = Sequence[float] | np.ndarray[Any, np.dtype[Any]]

_SERIES = ("#2f6fde", "#d9822b", "#2a9d74", "#b8498f", "#7a63d6", "#8a8f98")
_TEXT, _GRID = "#010203", "#040506"
_INCHES = (4.4, 2.9)
"""Small, so that text stays legible where a phone shrinks the chart to its width."""
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor"), _TEXT),
}


def line_chart(
    series: Mapping[str, tuple[Numbers, Numbers]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    horizontal: Mapping[str, float] | None = None,
    log_y: bool = False,
    markers: bool = False,
) -> str:
    """One line per entry of `series` (name -> xs, ys; NaN leaves a hole) and dashed `horizontal` lines by name."""
    figure, axes = _figure(title, x_label, y_label)
    for index, (name, (xs, ys)) in enumerate(series.items()):
        dots = "o" if markers or len(xs) == 1 else ""
        axes.plot(np.asarray(xs, float), np.asarray(ys, float), label=name, color=_colour(index), linewidth=1.6, marker=dots, markersize=3)
    for index, (name, level) in enumerate((horizontal or {}).items()):
        axes.axhline(level, label=name, color=_TEXT, linewidth=1.1, linestyle=("--", ":", "-.")[index % 3])
    if log_y:
        _log_axis(axes, [value for _, ys in series.values() for value in ys])
    return _svg(figure, axes, title, legend=len(series) + len(horizontal or {}) > 1, empty=not any(len(xs) for xs, _ in series.values()))


def histogram(
    values: Numbers,
    *,
    title: str,
    x_label: str,
    y_label: str,
    vertical: Mapping[str, float] | None = None,
    num_bins: int = 40,
    log_y: bool = False,
) -> str:
    """Counts of the finite `values` in `num_bins` equal bins, and dashed `vertical` lines by name."""
    finite = _finite(values)
    figure, axes = _figure(title, x_label, y_label)
    if len(finite):
        axes.hist(finite, bins=num_bins, color=_colour(0), rwidth=0.92, log=log_y)
        _log_axis(axes, [1.0]) if log_y else axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    for index, (name, level) in enumerate((vertical or {}).items()):
        axes.axvline(level, label=name, color=_TEXT, linewidth=1.1, linestyle=("--", ":", "-.")[index % 3])
    return _svg(figure, axes, title, legend=bool(vertical), empty=not len(finite))


def bar_chart(
    bars: Mapping[str, float], *, title: str, x_label: str, intervals: Mapping[str, tuple[float, float]] | None = None, highlight: str = ""
) -> str:
    """One horizontal bar per entry with its value written at its end; `intervals` draws (low, high) whiskers, `highlight` names a bar."""
    figure, axes = _figure(title, x_label, "")
    names = [name for name, value in bars.items() if np.isfinite(value)]
    colours = [_colour(1 if name == highlight else 0) for name in names]
    axes.barh(range(len(names)), [bars[name] for name in names], color=colours, height=0.55)
    top = max([*(bars[name] for name in names), *(high for _, high in (intervals or {}).values())], default=1.0) or 1.0
    for index, name in enumerate(names):
        low, high = (intervals or {}).get(name, (bars[name], bars[name]))
        if high > low:
            axes.plot([low, high], [index, index], color=_TEXT, linewidth=1.4, marker="|", markersize=9)
        axes.text(
            max(bars[name], high) + 0.02 * top,
            index,
            f"{bars[name]:.3g}",
            va="center",
            ha="left",
            color=_TEXT,
            fontsize=9,
            parse_math=False,
        )
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_xlim(0, 1.18 * top)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    return _svg(figure, axes, title, legend=False, empty=not names)


def scatter_chart(xs: Numbers, ys: Numbers, *, title: str, x_label: str, y_label: str, diagonal: str = "", max_points: int = 800) -> str:
    """One dot per pair; `diagonal` names a dashed line x = y. Beyond `max_points` an even sample of the pairs is drawn."""
    x, y = np.asarray(xs, float), np.asarray(ys, float)
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    chosen = np.unique(np.linspace(0, max(len(x) - 1, 0), num=min(len(x), max_points)).astype(int))
    figure, axes = _figure(title, x_label, y_label)
    axes.plot(x[chosen], y[chosen], linestyle="", marker="o", markersize=2.4, markeredgewidth=0, color=_colour(0), alpha=0.45)
    if diagonal and len(x):
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        axes.plot(ends, ends, color=_TEXT, linewidth=1.1, linestyle="--", label=diagonal)
    return _svg(figure, axes, title, legend=bool(diagonal), empty=not len(x))


def _figure(title: str, x_label: str, y_label: str) -> tuple[Figure, Any]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=_INCHES, layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        axes.set_title(title, loc="left", pad=10, parse_math=False)
        axes.set_xlabel(x_label, parse_math=False)
        axes.set_ylabel(y_label, parse_math=False)
        axes.grid(visible=True, color=_GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(length=3)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return figure, axes


def _log_axis(axes: Any, values: Sequence[float]) -> None:
    """Logarithmic y axis with plain numbers; stays linear where nothing is positive."""
    if any(value > 0 for value in values):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0), numticks=7))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _svg(figure: Figure, axes: Any, title: str, *, legend: bool, empty: bool) -> str:
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "chart"}):
        if empty:
            axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center")
        elif legend:
            columns = 2 if len(axes.get_legend_handles_labels()[0]) > 3 else 3
            for text in figure.legend(loc="outside lower left", ncols=columns, handlelength=1.8).get_texts():
                text.set_parse_math(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _themed(buffer.getvalue(), title)


def _themed(document: str, title: str) -> str:
    """The `<svg>` element alone: page colours, no size of its own, ids that stay unique when many charts share a page."""
    svg = document[document.index("<svg") :].strip()
    # matplotlib's <style> selects "*", which inline would restyle the whole page
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    prefix = "c" + hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{prefix}-", svg)
    svg = svg.replace(_TEXT, "currentColor").replace(_GRID, "var(--chart-grid, #d5d9df)")
    for index, colour in enumerate(_SERIES, start=1):
        svg = svg.replace(colour, f"var(--chart-{index}, {colour})")
    label = html.escape(title, quote=True)
    view_box = re.search(r'viewBox="[^"]+"', svg)
    assert view_box is not None
    opening = f'<svg class="chart" role="img" aria-label="{label}" stroke-linejoin="round" xmlns="http://www.w3.org/2000/svg" {view_box[0]}'
    return re.sub(r"<svg[^>]*>", lambda _: f'{opening} xmlns:xlink="http://www.w3.org/1999/xlink">', svg, count=1)


def _finite(values: Numbers) -> np.ndarray[Any, np.dtype[Any]]:
    array: np.ndarray[Any, np.dtype[Any]] = np.asarray(values, float)
    finite: np.ndarray[Any, np.dtype[Any]] = array[np.isfinite(array)]
    return finite


def _colour(index: int) -> str:
    return _SERIES[index % len(_SERIES)]
