"""A picture as data, independent of what draws it. ``pinfer plot --json`` prints it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Series:
    """One set of values with a name in the legend. Positions count from 0 in the panel's categories."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    """lower ends of the spread, if there is one"""
    high: tuple[float, ...] = ()
    """upper ends of the spread, or of spans"""
    labels: tuple[str, ...] = ()
    """text beside each point"""
    emphasis: bool = False
    """drawn above the others, in black"""


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    ``curves``: lines through (x, y). ``points``: (x, y) alone. ``columns``: stacked bars of heights y at positions x.
    ``bars``: stacked bars of lengths x at positions y. ``ranges``: values x with their spread at positions y.
    ``spans``: from x to high, at positions y.
    """

    kind: Literal["curves", "points", "columns", "bars", "ranges", "spans"]
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    categories: tuple[str, ...] = ()
    """names of the positions"""
    reference: float | None = None
    """where a line is drawn across: x of ``ranges``, y of ``curves``"""
    ordered: bool = False
    """the series are layers, in order: they share one scale of colours"""


@dataclass(frozen=True)
class Picture:
    """Panels below one another, under a common title."""

    title: str
    subtitle: str
    """the source of the data and the machine"""
    panels: tuple[Panel, ...]

    def to_json(self) -> dict[str, Any]:
        """The data drawn, as plain JSON values."""
        return asdict(self)
