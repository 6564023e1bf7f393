"""pinfer: neuron-aware inference for ReLU language models on stock llama.cpp."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pinfer.execution import ExecutionOptions
    from pinfer.generation import Model, generate
    from pinfer.preparation import PrepareOptions, prepare

__version__ = "0.1.0"
__all__ = ["ExecutionOptions", "Model", "PrepareOptions", "generate", "prepare"]


def __getattr__(name: str) -> object:
    """The public functions, imported when they are first used, so that ``pinfer --help`` is quick."""
    from importlib import import_module

    for module in ("generation", "preparation", "execution"):
        if name in __all__ and hasattr(found := import_module(f"pinfer.{module}"), name):
            return getattr(found, name)
    raise AttributeError(f"module 'pinfer' has no attribute {name!r}")
