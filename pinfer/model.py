"""A model as its GGUF describes it: its shape, its list of FFNs and what they compute."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pinfer.errors import PinferError
from pinfer.gguf_io.parts import read_model_file
from pinfer.gguf_io.reader import GgufError, GgufFile, Tensor
from pinfer.llama import ggml
from pinfer.llama.plugin import load_plugin

ACTIVATIONS = ("relu", "relu2", "reglu", "drelu", "reglu2")
GATED_ACTIVATIONS = ("reglu", "drelu", "reglu2")
ACTIVATION_KEY = "pinfer.ffn.activation"
THRESHOLD_KEY = "pinfer.ffn.activation_threshold"

_POWERINFER_MAGIC = b"PWRI"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w./-]+)?")

__all__ = [
    "ACTIVATIONS",
    "Ffn",
    "GgufError",
    "Model",
    "Tensor",
    "check_is_model",
    "dequantize",
    "describe_activation",
    "open_model",
]

FfnKind = Literal["dense", "shared", "experts"]
FFN_KINDS: tuple[FfnKind, ...] = ("dense", "shared", "experts")
_SUFFIX: Mapping[str, str] = {"dense": "", "shared": "_shexp", "experts": "_exps"}

_WEIGHED_BEFORE = ("llama4",)
"""architectures that multiply the input of an expert by the router's weight"""

MAX_LAYERS = 512
"""LLAMA_MAX_LAYERS; libllama aborts above it"""


@dataclass(frozen=True)
class Ffn:
    """One FFN: of a layer, the one that all tokens share beside its experts, or all of its experts as one stack.

    Matrices have GGUF's order: gate and up ``[n_embd, n_ff]``, down ``[n_ff, n_embd]``, with ``n_experts`` as a third
    axis in a stack. Neuron i of expert e has the number ``e * n_ff + i``.
    """

    layer: int
    kind: FfnKind
    n_embd: int
    n_ff: int
    """neurons, of one expert in a stack"""
    n_experts: int
    """1 unless it is a stack"""
    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    """biases ``[n_ff]`` and ``[n_embd]``, of a stack for each expert"""
    norm: Tensor | None = None
    """weight ``[n_ff]`` of an RMS norm between the activation and down (BitNet)"""

    @property
    def name(self) -> str:
        """What the names of its tensors in artefacts begin with: ``blk.3``, ``blk.3.shexp`` or ``blk.3.exps``."""
        return f"blk.{self.layer}{_SUFFIX[self.kind].replace('_', '.')}"

    @property
    def title(self) -> str:
        """For messages and tables."""
        return {
            "dense": f"layer {self.layer}",
            "shared": f"the shared expert of layer {self.layer}",
            "experts": f"the experts of layer {self.layer}",
        }[self.kind]

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """Gate (in gated models), up and down."""
        return tuple(t for t in (self.gate, self.up, self.down) if t is not None)

    @property
    def biases(self) -> dict[str, Tensor]:
        """Those it has, by their parts."""
        found = {"gate": self.gate_bias, "up": self.up_bias, "down": self.down_bias}
        return {part: bias for part, bias in found.items() if bias is not None}

    @property
    def n_bytes(self) -> int:
        """Bytes of its matrices."""
        return sum(t.n_bytes for t in self.matrices)

    @property
    def n_neurons(self) -> int:
        """Neurons of all its experts."""
        return self.n_ff * self.n_experts

    @property
    def is_stack(self) -> bool:
        return self.kind == "experts"

    @property
    def n_units(self) -> int:
        """What is placed as a whole, and numbered in placements and shards: neurons, or the experts of a stack."""
        return self.n_experts if self.is_stack else self.n_ff

    @property
    def units(self) -> str:
        """What a unit is, in the plural."""
        return "experts" if self.is_stack else "neurons"

    @property
    def unit(self) -> int:
        """Neurons of a unit."""
        return self.n_ff if self.is_stack else 1


@dataclass(frozen=True)
class Model:
    """A GGUF model."""

    path: Path
    fingerprint: str
    """32 hex digits"""
    arch: str
    name: str
    """the file's name, as stored in artefacts and shown in messages"""
    n_layer: int
    """layers that libllama runs, without those that draft further tokens"""
    n_embd: int
    n_ff: int
    """of the widest FFN"""
    n_expert_used: int
    """experts per token; 0 without experts"""
    n_vocab: int
    n_ctx_train: int
    n_head: tuple[int, ...]
    """per layer"""
    n_head_kv: tuple[int, ...]
    """per layer; 0 for a layer without KV cache"""
    head_dim_k: int
    head_dim_v: int
    activation: str
    """one of ``ACTIVATIONS`` or ``other``"""
    activation_threshold: float
    """a float32 value; the ReLU zeroes inputs up to it. 0 except for FATReLU"""
    gated: bool
    ffns: tuple[Ffn, ...] = field(repr=False)
    """those pinfer can compute, in the order of the layers; where nothing is zero, the stacks of experts alone"""
    obstacle: str
    """why pinfer cannot compute one of the FFNs; empty if it can compute all"""
    gguf: GgufFile = field(repr=False, compare=False)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor of the model."""
        return tuple(self.gguf.tensors.values())

    @property
    def is_sparse(self) -> bool:
        """Whether the FFN has exact zeros that pinfer can skip."""
        return self.activation in ACTIVATIONS and bool(self.ffns) and not self.obstacle

    @property
    def n_neurons(self) -> int:
        """Neurons of all FFNs."""
        return sum(f.n_neurons for f in self.ffns)

    @property
    def has_experts(self) -> bool:
        return any(f.is_stack for f in self.ffns)

    @property
    def stock_computes_it(self) -> bool:
        """Whether stock llama.cpp computes this model's activation."""
        return load_plugin().arch_activation(self.arch) == self.activation and self.activation_threshold == 0

    @property
    def places_experts(self) -> bool:
        """Whether nothing in its experts is exactly zero, so that whole ones are placed and no neuron is skipped."""
        return self.activation not in ACTIVATIONS and self.has_experts and not self.obstacle

    def require_placeable(self) -> None:
        """Raises PinferError if there are neither neurons nor experts that pinfer can place on devices."""
        if not self.places_experts:
            self.require_sparse()

    def require_sparse(self) -> None:
        """Raises PinferError if pinfer cannot skip any neurons of this model."""
        if self.is_sparse:
            return
        if self.places_experts:
            raise PinferError(
                f"the experts of {self.name} ({self.arch}) have no exact zeros, so no neuron can be skipped",
                f"place whole experts on a device: pinfer profile {self.path}, then pinfer solve and pinfer split",
            )
        if self.activation in ACTIVATIONS or (self.n_expert_used and self.obstacle):
            raise PinferError(f"{self.name} has {self.obstacle}", "run it dense: pinfer run --dense")
        raise PinferError(
            f"{self.name} (architecture {self.arch}) is not known to have a ReLU-family FFN",
            f"if it has one, name its activation: --activation {'|'.join(ACTIVATIONS)}",
        )

    def raw(self, tensor: Tensor) -> NDArray[np.uint8]:
        """The tensor's bytes in the mapped file, ``[n_rows, row_bytes]``, read-only."""
        return self.gguf.raw(tensor)

    def kv_bytes_per_token(self, layer: int, k_bytes: float, v_bytes: float) -> float:
        """Bytes of one token in a layer's KV cache, given the bytes of a key's and of a value's number."""
        return self.n_head_kv[layer] * (self.head_dim_k * k_bytes + self.head_dim_v * v_bytes)


def dequantize(
    model: Model, tensor: Tensor, rows: slice | Sequence[int] | NDArray[np.integer[Any]] = slice(None)
) -> NDArray[np.float32]:
    """Rows of a tensor of any type as float32, ``[len(rows), row_length]``."""
    if not ggml.can_dequantise(tensor.type):
        raise PinferError(f"cannot dequantise {tensor.name} of {model.name}: its type is {tensor.type_name}")
    return ggml.dequantise(model.raw(tensor)[rows], tensor.type, tensor.row_length)


def open_model(path: Path, activation: str | None = None) -> Model:
    """Read and check a model's header, without its weights.

    ``activation`` (from ``--activation``) overrides the file's ``pinfer.ffn.activation``, which overrides the
    architecture's own. A model in several files is named by the first. Raises PinferError for anything but a complete
    GGUF of a language model.
    """
    path = Path(path)
    if activation is not None and activation not in ACTIVATIONS:
        raise PinferError(f"unknown activation {activation!r}", f"use one of: {', '.join(ACTIVATIONS)}")
    gguf = _read(path)
    try:
        return _describe(path, gguf, activation)
    except GgufError as error:
        raise _unusable(path, error) from None


def check_is_model(path: Path) -> None:
    """Raises PinferError for what can be turned into a GGUF, with the command that does it.

    This covers checkpoint folders, PowerInfer files and names of hub repositories. Everything else is checked when the
    file is opened.
    """
    try:
        if (path / "config.json").is_file():
            raise PinferError(f"{path} is a checkpoint folder, not a GGUF", f"convert it: pinfer convert {path}")
        if path.is_file():
            with path.open("rb") as file:
                if file.read(len(_POWERINFER_MAGIC)) == _POWERINFER_MAGIC:
                    raise PinferError(f"{path} is in PowerInfer's format", f"convert it: pinfer convert {path}")
        elif _looks_like_repo(path):
            raise PinferError(f"{path} does not exist", f"download it from the hub: -hf {path}")
    except (OSError, ValueError):
        return


def _looks_like_repo(path: Path) -> bool:
    """``user/repo``, unless there is a folder ``user``."""
    text = str(path)
    return (
        _HUB_NAME.fullmatch(text) is not None
        and not text.partition(":")[0].lower().endswith(".gguf")
        and text[0] != "."
        and not path.exists()
        and not path.parent.exists()
    )


def _read(path: Path) -> GgufFile:
    check_is_model(path)
    try:
        return read_model_file(path)
    except GgufError as error:
        raise _unusable(path, error) from None
    except FileNotFoundError:
        raise PinferError(f"{path} does not exist", "check the path of the model") from None
    except IsADirectoryError:
        raise PinferError(f"{path} is a folder", "name the GGUF file in it") from None
    except OSError as error:
        raise PinferError(
            f"cannot read {path}: {error.strerror or error}", "check the path and its permissions"
        ) from None


def _unusable(path: Path, error: GgufError) -> PinferError:
    return PinferError(f"cannot use {path}: {error}", "download or convert the model again")


def _describe(path: Path, gguf: GgufFile, activation: str | None) -> Model:
    arch = gguf.get("general.architecture")
    if not isinstance(arch, str):
        raise GgufError("it has no general.architecture")
    if arch == "pinfer":
        raise PinferError(f"{path} is an artefact of pinfer, not a model", "pass the model it was made from")
    n_layer = _integer(gguf, f"{arch}.block_count")
    if n_layer > min(len(gguf.tensors), MAX_LAYERS):
        n_tensors = len(gguf.tensors)
        raise GgufError(f"it has {n_layer} layers in {n_tensors} tensors; libllama allows {MAX_LAYERS} layers")
    n_layer -= min(n_layer, _integer(gguf, f"{arch}.nextn_predict_layers", default=0))
    n_embd = _integer(gguf, f"{arch}.embedding_length")
    n_expert = _integer(gguf, f"{arch}.expert_count", default=0)
    found = activation or _activation(path, gguf, arch)
    kinds = FFN_KINDS if found in ACTIVATIONS or not n_expert else ("experts",)
    ffns, obstacle = _ffns(gguf, n_layer, n_embd, n_expert, kinds)
    if kinds == ("experts",):
        obstacle = obstacle or _why_not_placed(arch, ffns)
    widths = [f.n_ff for f in ffns] or _per_layer(gguf, f"{arch}.feed_forward_length", n_layer, 0)
    n_head = _per_layer(gguf, f"{arch}.attention.head_count", n_layer, 0)
    head_dim = n_embd // max(max(n_head, default=0), 1)
    n_head_kv = _per_layer(gguf, f"{arch}.attention.head_count_kv", n_layer, None) or n_head
    if found in ACTIVATIONS:
        _check_gate(path, ffns, found)
    token_embd = gguf.tensors.get("token_embd.weight")
    return Model(
        path=path,
        fingerprint=load_plugin().fingerprint(path),
        arch=arch,
        name=path.name,
        n_layer=n_layer,
        n_embd=n_embd,
        n_ff=max(widths, default=0),
        n_expert_used=max(_per_layer(gguf, f"{arch}.expert_used_count", n_layer, 0), default=0) if n_expert else 0,
        n_vocab=token_embd.n_rows if token_embd else gguf.count("tokenizer.ggml.tokens"),
        n_ctx_train=_integer(gguf, f"{arch}.context_length", default=0),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim_k=_integer(gguf, f"{arch}.attention.key_length", default=head_dim),
        head_dim_v=_integer(gguf, f"{arch}.attention.value_length", default=head_dim),
        activation=found,
        activation_threshold=_threshold(path, gguf),
        gated=found in GATED_ACTIVATIONS or (found not in ACTIVATIONS and any(f.gate for f in ffns)),
        ffns=ffns,
        obstacle=obstacle,
        gguf=gguf,
    )


def _integer(gguf: GgufFile, key: str, default: int | None = None) -> int:
    value = gguf.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
        raise GgufError(f"its {key} is {'missing' if value is None else f'{value!r}, not a valid number'}")
    return value


def _per_layer(gguf: GgufFile, key: str, n_layer: int, default: int | None) -> tuple[int, ...]:
    """A value that a GGUF stores once for all layers or once for each."""
    value = gguf.get(key)
    if value is None:
        return () if default is None else (default,) * n_layer
    values = value if isinstance(value, list) else [value] * n_layer
    if len(values) < n_layer or not all(isinstance(v, int) and v >= 0 for v in values):
        raise GgufError(f"its {key} is not valid")
    return tuple(values[:n_layer])


# Tensors by the role they have in an FFN, as libllama names them behind ``blk.N.``. Those of RWKV have other names.
_PARTS = {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
_RWKV_PARTS = {"up": "channel_mix_key", "down": "channel_mix_value"}


def _why_not_placed(arch: str, ffns: Sequence[Ffn]) -> str:
    """Why whole experts cannot be placed; empty if they can."""
    if arch in _WEIGHED_BEFORE:
        return "experts whose inputs are weighed instead of their outputs, which pinfer does not compute"
    ungated = next((f for f in ffns if f.gate is None), None)
    return f"experts without a gate in layer {ungated.layer}, which pinfer does not compute" if ungated else ""


def _ffns(
    gguf: GgufFile, n_layer: int, n_embd: int, n_expert: int, kinds: Sequence[FfnKind]
) -> tuple[tuple[Ffn, ...], str]:
    """The FFNs of these kinds in the layers, and why pinfer cannot compute one of them; empty if it can compute all."""
    found: list[Ffn] = []
    problems: list[str] = []
    for layer in range(n_layer):
        for kind in kinds:
            ffn, problem = _ffn(gguf, layer, kind, n_embd, n_expert, whole=kinds != FFN_KINDS)
            found += [ffn] if ffn else []
            problems += [problem] if problem else []
    if problems:
        return tuple(found), f"{problems[0]} ({len(problems)} of its {len(found) + len(problems)} FFNs)"
    return tuple(found), "" if found else "no FFN that pinfer knows"


def _ffn(
    gguf: GgufFile, layer: int, kind: FfnKind, n_embd: int, n_expert: int, *, whole: bool
) -> tuple[Ffn | None, str]:
    """One FFN of a layer if it has it, or why pinfer cannot compute it; ``whole`` experts may have biases."""

    def find(part: str, end: str) -> Tensor | None:
        names = [
            _PARTS[part] + _SUFFIX[kind],
            *([_RWKV_PARTS[part]] if kind == "dense" and part in _RWKV_PARTS else []),
        ]
        return next((t for n in names if (t := gguf.tensors.get(f"blk.{layer}.{n}.{end}"))), None)

    gate, up, down = (find(part, "weight") for part in _PARTS)
    fused = gguf.tensors.get(f"blk.{layer}.ffn_gate_up{_SUFFIX[kind]}.weight")
    if gate is None and up is None and down is None and fused is None:
        return None, ""
    where = f"layer {layer}"
    if fused is not None or (up and up.n_rows == 2 * (down.row_length if down else 0) and kind != "experts"):
        return None, f"gate and up as one matrix in {where}, which pinfer does not compute"
    if up is None or down is None:
        return None, f"an FFN without up or down matrix in {where}"
    stack = kind == "experts"
    n_experts = up.shape[2] if stack and len(up.shape) == 3 else 1
    if stack and n_experts != n_expert:
        raise GgufError(f"{up.name} holds {n_experts} experts, but its header says {n_expert}")
    width, n_ff = up.shape[0], up.shape[1] if len(up.shape) > 1 else 0
    deep = (n_experts,) if stack else ()
    wanted = ((gate, (width, n_ff, *deep)), (up, (width, n_ff, *deep)), (down, (n_ff, width, *deep)))
    if any(t is not None and t.shape != shape for t, shape in wanted) or (width != n_embd and not stack):
        if stack:
            raise GgufError(f"the expert matrices of {where} do not have the same shape")
        return None, f"FFN matrices of different shapes in {where}"
    biases = [find(part, "bias") for part in _PARTS]
    for bias in biases[:2]:
        if bias is not None and (bias.shape != (n_ff,) or bias.type_name != "F32") and not stack:
            return None, f"a bias that is not F32 in {where}"
    bias_shapes = ((n_ff, n_experts), (n_ff, n_experts), (width, n_experts))
    if stack and any(
        bias is not None and (not whole or bias.shape != shape or bias.type_name != "F32")
        for bias, shape in zip(biases, bias_shapes, strict=True)
    ):
        return None, f"experts with biases in {where}, which pinfer does not compute"
    if any(find(part, "scale") for part in _PARTS):
        return None, f"FFN matrices with scales of their own in {where}, which pinfer does not compute"
    norm = gguf.tensors.get(f"blk.{layer}.ffn_sub_norm.weight") if kind == "dense" else None
    if norm is not None and (norm.shape != (n_ff,) or norm.type_name != "F32"):
        return None, f"a norm that is not F32 in {where}"
    return Ffn(layer, kind, width, n_ff, n_experts, gate, up, down, biases[0], biases[1], biases[2], norm), ""


def _activation(path: Path, gguf: GgufFile, arch: str) -> str:
    named = gguf.get(ACTIVATION_KEY)
    if named is None:
        return load_plugin().arch_activation(arch)
    if named not in (*ACTIVATIONS, "other"):
        raise PinferError(f"{path} has {ACTIVATION_KEY} = {named!r}", f"pass --activation {'|'.join(ACTIVATIONS)}")
    return str(named)


def _threshold(path: Path, gguf: GgufFile) -> float:
    value = gguf.get(THRESHOLD_KEY)
    if value is None:
        return 0.0
    # float32, as in the file, the plugin and the artefacts
    threshold = ctypes.c_float(value).value if isinstance(value, float) else math.nan
    if not math.isfinite(threshold) or threshold < 0:
        raise PinferError(f"{path}: {THRESHOLD_KEY} must be 0 or more, not {value!r}", "convert the model again")
    return threshold


def describe_activation(activation: object, threshold: object) -> str:
    """``reglu``, or ``reglu above 0.01`` with a threshold."""
    return f"{activation} above {threshold:g}" if isinstance(threshold, float) and threshold > 0 else str(activation)


def _check_gate(path: Path, ffns: Sequence[Ffn], activation: str) -> None:
    wants_gate = activation in GATED_ACTIVATIONS
    for f in ffns:
        if (f.gate is not None) != wants_gate:
            raise PinferError(
                f"activation {activation} {'needs' if wants_gate else 'does not use'} ffn_gate tensors, "
                f"but {f.title} of {path.name} has {'none' if wants_gate else 'one'}",
                f"pass another --activation {'|'.join(ACTIVATIONS)}",
            )
