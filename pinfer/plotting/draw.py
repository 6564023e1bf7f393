"""Draws a picture: as PNG or SVG by matplotlib, or as text by plotext. Both are imported when they are needed."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pinfer.errors import PinferError
from pinfer.plotting.picture import Panel, Picture, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("png", "svg")

# Okabe and Ito's palette, which people with any colour vision can tell apart. Symbols and hatches differ as well.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
_SYMBOLS = "osD^vP*X"
_HATCHES = ("", "//", "..", "\\\\", "xx", "++", "oo", "--")
_TEXT_SYMBOLS = ("dot", "x", "o", "+", "*", "#", "@", "%")

_MOST_LABELS = 40  # texts beside points
_WIDTH = 9.0  # inches
_TEXT_WIDTH, _TEXT_HEIGHT = 100, 20
_LEAST_WIDTH = 40


def _colour(i: int) -> str:
    return _COLOURS[i % len(_COLOURS)]


def _is_free(series: Series) -> bool:
    return series.name == "free"


def _shown_positions(n: int, most: int) -> list[int]:
    """At most ``most`` of ``n`` positions, evenly spaced."""
    step = -(-n // most)
    return list(range(0, n, step))


# --- files ------------------------------------------------------------------------------------------------------------


def draw_file(picture: Picture, path: Path) -> None:
    """Writes a PNG or SVG, by the file's name. Raises PinferError without matplotlib."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise PinferError("-o needs matplotlib, which is not installed", "run: pip install 'matplotlib>=3.9'") from None
    heights = [_height(panel) for panel in picture.panels]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.8), layout="constrained")
    figure.suptitle(f"{picture.title}\n{picture.subtitle}", fontsize=11)
    grid = figure.subplots(len(picture.panels), 1, squeeze=False, height_ratios=heights)
    for axes, panel in zip(grid[:, 0], picture.panels, strict=True):
        _draw_panel(axes, panel)
    drawn = io.BytesIO()
    # The same data gives the same file.
    metadata: dict[str, Any] = {"Date": None} if path.suffix.lower() == ".svg" else {}
    with mpl.rc_context({"svg.hashsalt": "pinfer", "hatch.linewidth": 0.4}):
        figure.savefig(drawn, format=path.suffix[1:].lower(), dpi=110, metadata=metadata)
    path.write_bytes(drawn.getvalue())


def _height(panel: Panel) -> float:
    """Inches."""
    if panel.kind in ("bars", "ranges", "spans"):
        return 1.2 + 0.35 * len(panel.categories)
    return 3.4


def _draw_panel(axes: Axes, panel: Panel) -> None:
    drawing = {
        "curves": _draw_curves,
        "points": _draw_points,
        "columns": _draw_stack,
        "bars": _draw_stack,
        "ranges": _draw_ranges,
        "spans": _draw_spans,
    }
    drawing[panel.kind](axes, panel)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if panel.categories:
        lying = panel.kind in ("bars", "ranges", "spans")
        at = _shown_positions(len(panel.categories), 60 if lying else 24)
        (axes.set_yticks if lying else axes.set_xticks)(at, [panel.categories[i] for i in at])
        if lying:
            axes.set_ylim(len(panel.categories) - 0.4, -0.6)
        elif any(len(panel.categories[i]) > 4 for i in at):
            axes.tick_params(axis="x", labelrotation=40)
    handles, names = axes.get_legend_handles_labels()
    if len(names) > 1 or panel.ordered:
        beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
        axes.legend(handles, names, fontsize=8, frameon=False, **beside)


def _draw_curves(axes: Axes, panel: Panel) -> None:
    from matplotlib import colormaps

    ordered = [s for s in panel.series if not s.emphasis]
    named = _ends(len(ordered)) if panel.ordered else range(len(ordered))
    for i, series in enumerate(ordered):
        name = series.name if i in named else "_"
        if panel.ordered:
            colour = colormaps["cividis"](i / max(1, len(ordered) - 1))
            axes.plot(series.x, series.y, color=colour, linewidth=0.8, label=name)
            continue
        error = _error(series.y, series) if series.low else None
        axes.errorbar(
            series.x,
            series.y,
            yerr=error,
            color=_colour(i),
            marker=_SYMBOLS[i % len(_SYMBOLS)],
            markersize=4,
            linewidth=1.2,
            capsize=3,
            label=name,
        )
    for series in panel.series:
        if series.emphasis:
            axes.plot(series.x, series.y, color="black", linewidth=2, linestyle="--", label=series.name)
    if panel.reference is not None:
        axes.axhline(panel.reference, color="black", linewidth=0.8, linestyle=":")
    axes.grid(alpha=0.3)


def _ends(n: int) -> list[int]:
    """The first, middle and last of ``n``, which stand for all in a legend."""
    return sorted({0, (n - 1) // 2, n - 1})


def _error(values: Sequence[float], series: Series) -> list[list[float]]:
    return [
        [value - low for value, low in zip(values, series.low, strict=True)],
        [high - value for value, high in zip(values, series.high, strict=True)],
    ]


def _draw_points(axes: Axes, panel: Panel) -> None:
    n_labels = sum(len(series.labels) for series in panel.series)
    for i, series in enumerate(panel.series):
        marker = _SYMBOLS[i % len(_SYMBOLS)]
        axes.scatter(series.x, series.y, s=28, color=_colour(i), marker=marker, label=series.name, alpha=0.8)
        if n_labels <= _MOST_LABELS:
            for x, y, label in zip(series.x, series.y, series.labels, strict=True):
                axes.annotate(label, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7)
    if len(panel.series) == 1:
        axes.legend()
    axes.grid(alpha=0.3)


def _draw_stack(axes: Axes, panel: Panel) -> None:
    ends = [0.0] * len(panel.categories)
    for i, series in enumerate(panel.series):
        lying = panel.kind == "bars"
        at, sizes = (series.y, series.x) if lying else (series.x, series.y)
        starts = [ends[int(position)] for position in at]
        look: dict[str, Any] = {
            "color": "white" if _is_free(series) else _colour(i),
            "hatch": _HATCHES[i % len(_HATCHES)] if not _is_free(series) else "",
            "edgecolor": "black" if _is_free(series) else "white",
            "linewidth": 0.4,
            "label": series.name,
        }
        if lying:
            axes.barh(at, sizes, left=starts, height=0.6, **look)
        else:
            axes.bar(at, sizes, bottom=starts, width=0.85, **look)
        for position, size in zip(at, sizes, strict=True):
            ends[int(position)] += size


def _draw_ranges(axes: Axes, panel: Panel) -> None:
    for i, series in enumerate(panel.series):
        # Series beside one another would hide each other.
        at = [y + 0.18 * (i - (len(panel.series) - 1) / 2) for y in series.y]
        error = _error(series.x, series) if series.low else None
        axes.errorbar(
            series.x, at, xerr=error, fmt=_SYMBOLS[i % len(_SYMBOLS)], color=_colour(i), capsize=3, label=series.name
        )
    if panel.reference is not None:
        axes.axvline(panel.reference, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)


def _draw_spans(axes: Axes, panel: Panel) -> None:
    for i, series in enumerate(panel.series):
        widths = [end - begin for begin, end in zip(series.x, series.high, strict=True)]
        axes.barh(series.y, widths, left=series.x, height=0.6, color=_colour(i), label=series.name)


# --- text -------------------------------------------------------------------------------------------------------------


def draw_text(picture: Picture) -> str:
    """The picture for the terminal, or as wide as a page elsewhere. Raises PinferError without plotext."""
    try:
        import plotext
    except ImportError:
        raise PinferError("drawing in the terminal needs plotext, which is not installed", _PLOTEXT) from None
    if not hasattr(plotext, "stacked_bar"):
        raise PinferError("this version of plotext has another interface", _PLOTEXT)
    width = max(_LEAST_WIDTH, shutil.get_terminal_size((_TEXT_WIDTH, 0)).columns)
    parts = [picture.title, picture.subtitle]
    for panel in picture.panels:
        parts += ["", _text_panel(plotext, panel, width)]
    return "\n".join(parts)


_PLOTEXT = "run: pip install 'plotext>=5.3,<6', or write a file: -o picture.png"


def _text_panel(plt: Any, panel: Panel, width: int) -> str:
    plt.clear_figure()
    plt.limit_size(False, False)
    lying = panel.kind in ("bars", "ranges", "spans")
    plt.plot_size(width, len(panel.categories) * 2 + 6 if lying else _TEXT_HEIGHT)
    drawing = {
        "curves": _text_curves,
        "points": _text_points,
        "columns": _text_stack,
        "bars": _text_stack,
        "ranges": _text_ranges,
        "spans": _text_spans,
    }
    drawing[panel.kind](plt, panel)
    plt.title(panel.title)
    plt.xlabel(panel.x_label)
    plt.ylabel(panel.y_label)
    if panel.categories and panel.kind != "bars":
        at = _shown_positions(len(panel.categories), 40 if lying else width // 12)
        (plt.yticks if lying else plt.xticks)(at, [panel.categories[i] for i in at])
    text: str = plt.build()
    return text if sys.stdout.isatty() and "NO_COLOR" not in os.environ else plt.uncolorize(text)


def _rgb(i: int) -> tuple[int, int, int]:
    code = _colour(i)
    return int(code[1:3], 16), int(code[3:5], 16), int(code[5:7], 16)


def _text_symbol(i: int) -> str:
    return _TEXT_SYMBOLS[i % len(_TEXT_SYMBOLS)]


def _text_curves(plt: Any, panel: Panel) -> None:
    """All curves, but of layers only some: a terminal has too few dots for more."""
    plain = [s for s in panel.series if not s.emphasis]
    shown = [plain[i] for i in _ends(len(plain))] if panel.ordered else plain
    for i, series in enumerate([*shown, *(s for s in panel.series if s.emphasis)]):
        plt.plot(series.x, series.y, color=_rgb(i), marker=_text_symbol(i), label=series.name)
        if series.low:
            plt.error(series.x, series.y, yerr=_widths(series.low, series.high), color=_rgb(i))
    if panel.reference is not None:
        plt.hline(panel.reference)


def _widths(low: Sequence[float], high: Sequence[float]) -> list[float]:
    return [b - a for a, b in zip(low, high, strict=True)]


def _text_points(plt: Any, panel: Panel) -> None:
    for i, series in enumerate(panel.series):
        plt.scatter(series.x, series.y, color=_rgb(i), marker=_text_symbol(i), label=series.name)


def _text_stack(plt: Any, panel: Panel) -> None:
    lying = panel.kind == "bars"
    sizes = [list(series.x if lying else series.y) for series in panel.series]
    names = [series.name for series in panel.series]
    plt.stacked_bar(
        list(panel.categories),
        sizes,
        labels=names,
        color=[_rgb(i) for i in range(len(names))],
        orientation="h" if lying else "v",
    )


def _text_ranges(plt: Any, panel: Panel) -> None:
    for i, series in enumerate(panel.series):
        plt.scatter(series.x, series.y, color=_rgb(i), marker=_text_symbol(i), label=series.name)
        for y, low, high in zip(series.y, series.low, series.high, strict=False):
            plt.plot([low, high], [y, y], color=_rgb(i), marker="-")
    if panel.reference is not None:
        plt.vline(panel.reference)


def _text_spans(plt: Any, panel: Panel) -> None:
    for i, series in enumerate(panel.series):
        for k, (begin, end, row) in enumerate(zip(series.x, series.high, series.y, strict=True)):
            label = {"label": series.name} if k == 0 else {}
            plt.plot([begin, end], [row, row], color=_rgb(i), marker=_text_symbol(i), **label)
