"""File names of models in several files, as llama.cpp's tools give them: ``NAME-00001-of-00003.gguf`` and so on."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class PartName:
    """A file name of a part, taken apart. ``number`` counts from 1."""

    stem: str
    number: int
    count: int

    @property
    def whole(self) -> str:
        """Name of the model as a single file."""
        return f"{self.stem}.gguf"

    def sibling(self, number: int) -> str:
        """File name of another part."""
        return f"{self.stem}-{number:05d}-of-{self.count:05d}.gguf"

    def siblings(self) -> list[str]:
        """File names of all parts, in order."""
        return [self.sibling(number) for number in range(1, self.count + 1)]


def part_name(name: str) -> PartName | None:
    """A part's file name (or path in a repository) taken apart; None if it is not the name of a part."""
    match = _PART.fullmatch(name)
    return PartName(match["stem"], int(match["number"]), int(match["count"])) if match else None
