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
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which people with any colour vision can tell apart. Symbols and hatches differ as well.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
_SYMBOLS = "osD^vP*X"
_HATCHES = ("", "//", "..", "\\\\", "xx", "++", "oo", "--")
_TEXT_SYMBOLS = ("dot", "x", "o", "+", "*", "#", "@", "%")
_FILLS = "█▒░#=+~:"

_LYING = ("bars", "ranges", "spans")
"""kinds whose positions are on the y axis"""

_MOST_LABELS = 40  # texts beside points
_LABEL_ROOM = 60  # characters below an axis
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
    except ImportError:
        raise PinferError("-o needs matplotlib, which is not installed", "run: pip install 'matplotlib>=3.9'") from None
    drawn = io.BytesIO()
    # The same data gives the same file.
    metadata: dict[str, Any] = {"Date": None} if path.suffix.lower() == ".svg" else {}
    with mpl.rc_context({"svg.hashsalt": "pinfer", "hatch.linewidth": 0.4}):
        figure_of(picture).savefig(drawn, format=path.suffix[1:].lower(), dpi=110, metadata=metadata)
    path.write_bytes(drawn.getvalue())


def figure_of(picture: Picture) -> Figure:
    """The picture as a matplotlib figure."""
    from matplotlib.figure import Figure

    heights = [_height(panel) for panel in picture.panels]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.8), layout="constrained")
    figure.suptitle(f"{picture.title}\n{picture.subtitle}", fontsize=11)
    grid = figure.subplots(len(picture.panels), 1, squeeze=False, height_ratios=heights)
    for axes, panel in zip(grid[:, 0], picture.panels, strict=True):
        _draw_panel(axes, panel)
    return figure


def _height(panel: Panel) -> float:
    """Inches."""
    if panel.kind in _LYING:
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
    if panel.x_label == "layer" and not panel.categories:
        axes.locator_params(axis="x", integer=True)
    if panel.categories:
        lying = panel.kind in _LYING
        at = _shown_positions(len(panel.categories), 60 if lying else 24)
        (axes.set_yticks if lying else axes.set_xticks)(at, [panel.categories[i] for i in at])
        if lying:
            axes.set_ylim(len(panel.categories) - 0.4, -0.6)
        elif sum(len(panel.categories[i]) for i in at) > _LABEL_ROOM:
            axes.tick_params(axis="x", labelrotation=40)
    handles, names = axes.get_legend_handles_labels()
    if len(names) > 1 or panel.kind in ("ranges", "points"):
        axes.legend(handles, names, fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_curves(axes: Axes, panel: Panel) -> None:
    from matplotlib import colormaps

    ordered = [s for s in panel.series if not s.emphasis]
    named = _ends(len(ordered)) if panel.ordered else range(len(ordered))
    for i, series in enumerate(ordered):
        name = series.name if i in named else "_"
        if panel.ordered:
            colour = colormaps["cividis"](0.9 * i / max(1, len(ordered) - 1))
            axes.plot(series.x, series.y, color=colour, linewidth=0.8, label=name)
            continue
        error = _error(series.y, series) if series.low else None
        # Bars of spread at the same place would hide each other.
        shift = 0.03 * (i - (len(ordered) - 1) / 2) if series.low else 0.0
        axes.errorbar(
            [x + shift for x in series.x],
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
    axes.set_ylim(bottom=0)
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
    if not hasattr(plotext, "clear_figure"):
        raise PinferError("this version of plotext has another interface", _PLOTEXT)
    width = max(_LEAST_WIDTH, shutil.get_terminal_size((_TEXT_WIDTH, 0)).columns)
    parts = [picture.title, picture.subtitle]
    for panel in picture.panels:
        parts += ["", _text_panel(plotext, panel, width)]
    return "\n".join(parts)


_PLOTEXT = "run: pip install 'plotext>=5.3,<6', or write a file: -o picture.png"


def _text_panel(plt: Any, panel: Panel, width: int) -> str:
    in_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    text = _rows(panel, width) if panel.kind not in ("curves", "points") else _chart(plt, panel, width)
    return text if in_colour else str(plt.uncolorize(text))


def _rgb(i: int) -> tuple[int, int, int]:
    code = _colour(i)
    return int(code[1:3], 16), int(code[3:5], 16), int(code[5:7], 16)


def _chart(plt: Any, panel: Panel, width: int) -> str:
    """Curves or points. Of curves by layer only some are shown: a terminal has too few dots for more."""
    plt.clear_figure()
    plt.limit_size(False, False)
    plt.plot_size(width, _TEXT_HEIGHT)
    plain = [s for s in panel.series if not s.emphasis]
    shown = [plain[i] for i in _ends(len(plain))] if panel.ordered else plain
    for i, series in enumerate([*shown, *(s for s in panel.series if s.emphasis)]):
        draw = plt.scatter if panel.kind == "points" else plt.plot
        draw(series.x, series.y, color=_rgb(i), marker=_TEXT_SYMBOLS[i % len(_TEXT_SYMBOLS)], label=series.name)
        if series.low:
            for x, low, high in zip(series.x, series.low, series.high, strict=True):
                plt.plot([x, x], [low, high], color=_rgb(i), marker="|")
    if panel.reference is not None:
        plt.hline(panel.reference)
    plt.title(panel.title)
    plt.xlabel(panel.x_label)
    plt.ylabel(panel.y_label)
    if panel.categories:
        at = _shown_positions(len(panel.categories), width // 12)
        plt.xticks(at, [panel.categories[i] for i in at])
    return str(plt.build())


def _rows(panel: Panel, width: int) -> str:
    """One line for each category. Series differ by character as well, so colours are not needed."""
    is_stack = panel.kind in ("columns", "bars")
    unit = panel.y_label if panel.kind == "columns" else panel.x_label
    margin = max(map(len, panel.categories))
    room = max(10, width - margin - 12)
    cells: list[list[tuple[float, float, int]]] = [[] for _ in panel.categories]  # begin, end, series
    for i, series in enumerate(panel.series):
        for position, begin, end in _extents(panel, series):
            start = cells[position][-1][1] if is_stack and cells[position] else begin
            cells[position].append((start, start + end - begin, i))
    most = max([panel.reference or 0.0, *(end for row in cells for _, end, _ in row)]) or 1.0
    lines = [panel.title, "  ".join(_painted(_fill(panel, i), i) + " " + s.name for i, s in enumerate(panel.series))]
    for name, row in zip(panel.categories, cells, strict=True):
        drawn = [(" ", -1)] * (room + 1)
        if panel.reference is not None:
            drawn[round(room * panel.reference / most)] = ("┊", -1)
        for begin, end, i in row:
            first, last = round(room * begin / most), round(room * end / most)
            for at in range(first, last if is_stack else max(last, first + 1)):
                drawn[at] = ("-" if panel.kind == "ranges" else _fill(panel, i), i)
        for i, series in enumerate(panel.series if panel.kind == "ranges" else ()):
            for value, y in zip(series.x, series.y, strict=True):
                if panel.categories[int(y)] == name:
                    drawn[round(room * value / most)] = (_fill(panel, i), i)
        lines.append(f"{name:>{margin}} │" + "".join(_painted(*cell) for cell in drawn).rstrip())
    lines.append(f"{'':>{margin}} └ 0 to {most:.4g} {unit}")
    return "\n".join(lines)


def _extents(panel: Panel, series: Series) -> list[tuple[int, float, float]]:
    """Position, begin and end of each value."""
    if panel.kind == "columns":
        return [(int(x), 0.0, y) for x, y in zip(series.x, series.y, strict=True)]
    if panel.kind == "bars":
        return [(int(y), 0.0, x) for x, y in zip(series.x, series.y, strict=True)]
    begins, ends = (series.x, series.high) if panel.kind == "spans" else (series.low, series.high)
    if not ends:
        begins = ends = series.x
    return [(int(y), begin, end) for y, begin, end in zip(series.y, begins, ends, strict=True)]


def _fill(panel: Panel, i: int) -> str:
    if panel.kind == "ranges":
        return "ox*+#@%&"[i % 8]
    return "·" if _is_free(panel.series[i]) else _FILLS[i % len(_FILLS)]


def _painted(text: str, i: int) -> str:
    if i < 0:
        return text
    r, g, b = _rgb(i)
    return f"\x1b[38;2;{r};{g};{b}m{text}\x1b[0m"
