"""Numbers for people: sizes, amounts, rates, durations and shares."""

from __future__ import annotations

_UNITS = ("", "Ki", "Mi", "Gi", "Ti", "Pi")


def format_bytes(n: float) -> str:
    """``1536`` -> ``1.5 KiB``; plain bytes below 1024."""
    power = 0
    while abs(n) >= 1024 and power < len(_UNITS) - 1:
        n /= 1024
        power += 1
    return f"{n:.0f} B" if power == 0 else f"{n:.1f} {_UNITS[power]}B"


def format_amount(n: float, unit: str) -> str:
    """An amount of work: bytes in binary units, anything else as a grouped number."""
    return format_bytes(n) if unit == "bytes" else f"{n:,.0f} {unit}"


def format_done(done: float, total: float, unit: str) -> str:
    """Work done out of the total, ``512 of 2,048 tokens``. A total of 0 means unknown and is left out."""
    if total <= 0:
        return format_amount(done, unit)
    return f"{format_bytes(done) if unit == 'bytes' else f'{done:,.0f}'} of {format_amount(total, unit)}"


def format_rate(rate: float, unit: str) -> str:
    """Work per second, e.g. ``4,812 tokens/s`` or ``1.2 GiB/s``; slow rates keep one decimal."""
    if unit == "bytes":
        return f"{format_bytes(rate)}/s"
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.1f} {unit}/s"


def format_seconds(seconds: float) -> str:
    """``75`` -> ``1:15``, ``3675`` -> ``1:01:15``."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def percent(share: float) -> str:
    """A share between 0 and 1 as a percentage with one decimal."""
    return f"{100 * share:.1f} %"


def ffn_label(layer: int, kind: str) -> str:
    """``3``, ``3 shared`` or ``3 experts``: an FFN in a table by layers."""
    return str(layer) if kind == "dense" else f"{layer} {kind}"
