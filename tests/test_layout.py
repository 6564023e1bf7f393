"""The packages of pinfer form layers: a module imports from its own layer and those below, never in a cycle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VERBS = (
    "profile",
    "train",
    "solve",
    "split",
    "run",
    "serve",
    "eval",
    "bench",
    "show",
    "plot",
    "library",
    "convert",
    "exec",
    "demo",
)
# From the ground up. A module belongs to the layer that names it, or else to that of its package.
LAYERS = (
    ("pinfer.errors", "pinfer.progress", "pinfer.interrupt"),
    ("pinfer.gguf_io", "pinfer.hub"),
    ("pinfer.llama.ggml", "pinfer.llama.plugin"),
    ("pinfer.model",),
    ("pinfer.llama",),
    ("pinfer.artefacts",),
    ("pinfer.predictors", "pinfer.placement", "pinfer.benchmark", "pinfer.conversion"),
    ("pinfer.execution", "pinfer.plotting"),
    (*(f"pinfer.{verb}" for verb in VERBS), "pinfer.preparation", "pinfer.generation", "pinfer.down_rows"),
    ("pinfer",),  # the Python API
    ("pinfer.cli",),
    ("pinfer.__main__",),
)


@dataclass(frozen=True)
class Import:
    """A module that is imported, or one name of it."""

    importer: str
    line: int
    module: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.module}{f'.{self.name}' if self.name else ''}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "pinfer").rglob("*.py"))}


def imports_of(importer: str) -> Iterator[Import]:
    """All imports of pinfer's own modules: at module level, inside functions and for type checkers.

    Any module may import ``pinfer.__version__``.
    """
    for node in ast.walk(ast.parse(MODULES[importer].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [Import(importer, node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found = [
                Import(importer, node.lineno, full)
                if (full := f"{module}.{alias.name}") in MODULES
                else Import(importer, node.lineno, module, alias.name)
                for alias in node.names
            ]
        else:
            continue
        ours = (each for each in found if each.module.partition(".")[0] == "pinfer")
        yield from (each for each in ours if each.name != "__version__")


IMPORTS = [found for module in MODULES for found in imports_of(module)]


def layer_of(module: str) -> int:
    names = {name: level for level, layer in enumerate(LAYERS) for name in layer}
    while module not in names:
        module = module.rpartition(".")[0]
    return names[module]


def test_every_package_and_top_module_has_a_layer() -> None:
    placed = {name for layer in LAYERS for name in layer}
    assert {module for module in MODULES if module.count(".") < 2} <= placed, "add these to LAYERS"
    assert placed <= set(MODULES), "LAYERS names modules that do not exist"


def test_no_module_imports_from_a_layer_above() -> None:
    wrong = [str(each) for each in IMPORTS if layer_of(each.module) > layer_of(each.importer)]
    assert not wrong, "\n".join(wrong)


def test_private_names_are_not_imported() -> None:
    wrong = [str(each) for each in IMPORTS if each.name.startswith("_") and not each.name.endswith("__")]
    assert not wrong, "\n".join(wrong)


def test_imports_form_no_cycle() -> None:
    """An import inside a function counts as well; it would only hide the cycle."""
    graph = {module: {each.module for each in IMPORTS if each.importer == module} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))
