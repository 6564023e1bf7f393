"""Draws docs/speed.svg, the speed of each model against stock llama.cpp, from the first table in docs/benchmarks.md.

python tools/plot_speed.py            # write docs/speed.svg
python tools/plot_speed.py --check    # exit code 1 if docs/speed.svg is out of date
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
TABLE = DOCS / "benchmarks.md"
PICTURE = DOCS / "speed.svg"

_ROW = re.compile(
    r"\| (?P<model>[^|]+) \| (?P<mode>predicted|exact) \| (?P<ours>[\d.]+) \| (?P<stock>[\d.]+) "
    r"\| \*\*(?P<ratio>[\d.]+)\*\* \((?P<low>[\d.]+)-(?P<high>[\d.]+)\) \|"
)

WIDTH = 760
LEFT = 220  # of the bars, in pixels
UNIT = 88  # pixels for a ratio of 1
LABELS = LEFT + 4 * UNIT + 12
ROW = 26
TOP = 44
# Readable on light and on dark pages.
INK, BARS, SPREAD = "#7d8590", {"predicted": "#2f81f7", "exact": "#8957e5"}, "#adbac7"


@dataclass(frozen=True)
class Speed:
    """One row of the table: tokens per second on both sides, and the ratio with its smallest and largest value."""

    model: str
    mode: str
    ours: float
    stock: float
    ratio: float
    low: float
    high: float


def _first_table(text: str) -> str:
    """The text from the first row of the first table with such rows to the table's end."""
    first = _ROW.search(text)
    return text[first.start() :].partition("\n\n")[0] if first else ""


def read_table(text: str) -> list[Speed]:
    """The rows for decoding one sequence, in their order. Raises ValueError if there are none."""
    rows = [
        Speed(m["model"].strip(), m["mode"], *(float(m[name]) for name in ("ours", "stock", "ratio", "low", "high")))
        for m in _ROW.finditer(_first_table(text))
    ]
    if not rows:
        raise ValueError(f"{TABLE} has no table of decoding speeds")
    return rows


def draw(rows: list[Speed]) -> str:
    """The picture as SVG."""
    height = TOP + ROW * len(rows) + 44
    bottom = TOP + ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="13" fill="{INK}">',
        "<title>Decoding speed of pinfer as a multiple of stock llama.cpp</title>",
        f'<text x="0" y="16" font-size="15">Decoding speed, stock llama.cpp = 1 '
        f'(<tspan fill="{BARS["predicted"]}">with predictor</tspan>, '
        f'<tspan fill="{BARS["exact"]}">exact</tspan>; the line is the range)</text>',
    ]
    for tick in range(5):
        x = LEFT + tick * UNIT
        dash = "" if tick == 1 else ' stroke-dasharray="2 4"'
        parts.append(f'<line x1="{x}" y1="{TOP - 14}" x2="{x}" y2="{bottom}" stroke="{INK}"{dash}/>')
        parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{tick}×</text>')
    for number, row in enumerate(rows):
        y = TOP + ROW * number
        low, high = (round(LEFT + UNIT * value) for value in (row.low, row.high))
        label = f'<tspan font-weight="bold">{row.ratio:.2f}×</tspan> {row.ours:.1f} vs {row.stock:.1f} t/s'
        parts += [
            f'<text x="{LEFT - 8}" y="{y + 5}" text-anchor="end">{escape(row.model)}</text>',
            f'<rect x="{LEFT}" y="{y - 8}" width="{round(UNIT * row.ratio)}" height="16" fill="{BARS[row.mode]}"/>',
            f'<line x1="{low}" y1="{y}" x2="{high}" y2="{y}" stroke="{SPREAD}" stroke-width="2"/>',
            f'<text x="{LABELS}" y="{y + 5}">{label}</text>',
        ]
    machine = "2 cores of an AMD EPYC (Zen 4), synthetic weights with 10 % of the neurons active; docs/benchmarks.md"
    parts.append(f'<text x="0" y="{height - 6}" font-size="12">{machine}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main(arguments: list[str]) -> int:
    picture = draw(read_table(TABLE.read_text(encoding="utf-8")))
    if arguments == ["--check"]:
        if PICTURE.exists() and PICTURE.read_text(encoding="utf-8") == picture:
            return 0
        print(f"error: {PICTURE} is out of date; run: python tools/plot_speed.py", file=sys.stderr)
        return 1
    if arguments:
        print(__doc__, file=sys.stderr)
        return 2
    PICTURE.write_text(picture, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
