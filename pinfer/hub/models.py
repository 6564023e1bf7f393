"""Models on the Hugging Face hub: which files of a repository ``-hf`` means, and their paths once downloaded."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pinfer.errors import PinferError
from pinfer.gguf_io.part_names import part_name
from pinfer.hub.fetch import cached_files, explain, fetch_files, is_offline
from pinfer.progress import NULL_PROGRESS, Progress

_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<wanted>[^:]+))?")
_QUANT = re.compile(r"[-.](?P<quant>[A-Za-z0-9_]+)$")

# Without a quant in the name, the first of these that exists, as in llama.cpp; else the first file.
_DEFAULT_QUANTS = ("Q4_K_M", "Q8_0")
# GGUFs that accompany a model: projectors, statistics for quantising, draft models.
_COMPANIONS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
)

# Files that list the shards of the weights; the first that a repository has is used.
_INDICES = {"model.safetensors.index.json": "*.safetensors", "pytorch_model.bin.index.json": "pytorch_model*.bin"}


@dataclass(frozen=True)
class HubName:
    """``user/repo``, and the quant or file after the colon."""

    repo: str
    wanted: str = ""

    def __str__(self) -> str:
        return f"{self.repo}:{self.wanted}" if self.wanted else self.repo


def parse_name(text: str) -> HubName:
    """``user/repo``, ``user/repo:q4_0`` or ``user/repo:model-q4_0.gguf``. Raises PinferError for anything else."""
    match = _NAME.fullmatch(text)
    if match is None:
        raise PinferError(
            f"{text!r} is not the name of a model on the hub",
            "write it like -hf user/repo, -hf user/repo:q4_0 or -hf user/repo:FILE",
        )
    return HubName(match["repo"], match["wanted"] or "")


def fetch_gguf(name: str, progress: Progress = NULL_PROGRESS, *, offline: bool = False) -> Path:
    """The GGUF that ``name`` means (see ``parse_name``) in the hub's cache, downloaded if it is not there.

    A model in several files is downloaded whole; the path is the first part's.
    With ``offline``, or if the hub cannot be reached, the cache is used. Raises PinferError.
    """
    which = parse_name(name)
    cause: PinferError | None = None
    if not (offline or is_offline()):
        try:
            names = _list_files(which.repo)
            chosen = choose_gguf(names, which)
            for name in chosen:
                if name not in names:
                    raise PinferError(f"{which.repo} lacks {name}, a part of the model", "name another repository")
            return fetch_files(which.repo, chosen, Path(chosen[0]).name, progress)[0]
        except PinferError:
            raise
        except Exception as error:  # depends on the HTTP client
            cause = explain(error, which.repo)
    cached = cached_files(which.repo)
    try:
        path = _cached_gguf(which, _require_cached(which.repo, cached))
    except PinferError as error:
        raise cause or error from None
    if cause is not None:
        progress.note(f"{cause.message}; taking {path.name} from the cache")
    return path


def fetch_checkpoint(repo: str, progress: Progress = NULL_PROGRESS, *, offline: bool = False) -> Path:
    """Folder in the hub's cache with config.json, weights and tokenizer of a checkpoint, downloaded if needed.

    Weights are safetensors, or pickled files if there are no others. With ``offline``, or if the hub cannot be reached,
    the cache is used if it is complete. Raises PinferError.
    """
    which = parse_name(repo)
    if which.wanted:
        raise PinferError(f"a checkpoint is a whole repository, {which} is a part of it", f"write {which.repo}")
    cached = cached_files(repo)
    if offline or is_offline():
        return _cached_checkpoint(repo, _require_cached(repo, cached))
    try:
        names = set(_list_files(repo))
    except Exception as error:
        cause = explain(error, repo)
        if "config.json" not in cached:
            raise cause from error
        progress.note(f"{cause.message}; taking what the cache has")
        return _cached_checkpoint(repo, cached)
    if "config.json" not in names:
        raise _no_checkpoint(repo, names)
    try:
        # The first file gives the commit; all others are taken from the same one.
        folder = fetch_files(repo, ["config.json"], "config.json", progress)[0].parent
        index = next((name for name in _INDICES if name in names), None)
        if index is not None and _whole(index) not in names:
            fetch_files(repo, [index], index, progress, revision=folder.name)
        wanted = _weights(repo, names, folder) + [name for name in _TOKENIZER_FILES if name in names]
        fetch_files(repo, wanted, repo, progress, revision=folder.name)
    except PinferError:
        raise
    except Exception as error:
        raise explain(error, repo) from error
    return folder


def choose_gguf(names: Iterable[str], which: HubName) -> list[str]:
    """The file among ``names`` that is meant, chosen as in llama.cpp, or all parts of it in order.

    Raises PinferError if there is none.
    """
    names = sorted(names)
    models = [name for name in names if _is_model(name)]
    if which.wanted.lower().endswith(".gguf"):
        wanted = which.wanted.lower()
        found = [name for name in names if name.lower() == wanted or name.lower().endswith(f"/{wanted}")]
    elif which.wanted:
        found = _of_quant(models, which.wanted)
    else:
        found = next((fit for quant in _DEFAULT_QUANTS if (fit := _of_quant(models, quant))), models)
    if not found:
        raise _nothing_fits(names, models, which)
    part = part_name(found[0])
    if part is None:
        return found[:1]
    if part.number != 1:
        raise PinferError(
            f"{found[0]} of {which.repo} is part {part.number} of {part.count}",
            f"name the first: -hf {which.repo}:{part.sibling(1)}",
        )
    return part.siblings()


def _cached_gguf(which: HubName, cached: Mapping[str, Path]) -> Path:
    """A GGUF in the cache, with all its parts in one snapshot."""
    chosen = choose_gguf(cached, which)
    first = cached[chosen[0]]
    for name in chosen:
        if cached.get(name, name) != first.with_name(Path(name).name):
            raise PinferError(f"the cache lacks {name} of {which.repo}", "run the command once without --offline")
    return first


def _is_model(name: str) -> bool:
    base, part = name.rpartition("/")[2].lower(), part_name(name)
    is_later_part = part is not None and part.number != 1
    return base.endswith(".gguf") and not is_later_part and not any(word in base for word in _COMPANIONS)


def _of_quant(names: Iterable[str], quant: str) -> list[str]:
    """Files with the quant as a word in their name: F16 does not match BF16."""
    pattern = re.compile(rf"(?<![A-Za-z0-9]){re.escape(quant)}[.-]", re.IGNORECASE)
    return [name for name in names if pattern.search(name)]


def _nothing_fits(names: Iterable[str], models: Iterable[str], which: HubName) -> PinferError:
    stems = [part.stem if (part := part_name(name)) else name.removesuffix(".gguf") for name in models]
    quants = [match["quant"] if (match := _QUANT.search(stem)) else stem for stem in stems]
    if quants:
        there = ", ".join(quants[:12]) + (", …" if len(quants) > 12 else "")
        return PinferError(f"{which.repo} has no GGUF {which.wanted}", f"name one that it has: {there}")
    if any(name.endswith(".safetensors") or Path(name).match("pytorch_model*.bin") for name in names):
        return PinferError(
            f"{which.repo} has a checkpoint, not a GGUF", f"make a GGUF: pinfer convert -hf {which.repo}"
        )
    return PinferError(f"{which.repo} has no GGUF", "name another repository")


def _require_cached(repo: str, cached: Mapping[str, Path]) -> Mapping[str, Path]:
    if not cached:
        raise PinferError(f"the cache has nothing of {repo}", "run the command once without --offline (HF_HUB_OFFLINE)")
    return cached


def _list_files(repo: str) -> list[str]:
    from huggingface_hub import HfApi, constants

    api = HfApi(library_name="pinfer")
    found = api.model_info(repo, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    return [file.rfilename for file in found.siblings or []]


def _whole(index: str) -> str:
    """The file that has all weights, where they are not in shards."""
    return index.removesuffix(".index.json")


def _weights(repo: str, names: Collection[str], folder: Path) -> list[str]:
    """Files of the weights: the whole file, else the shards in the index, else all in the top folder."""
    for index, pattern in _INDICES.items():
        if _whole(index) in names:
            return [_whole(index)]
        if index in names:
            return _indexed(repo, folder / index)
        if found := sorted(name for name in names if "/" not in name and Path(name).match(pattern)):
            return found
    raise _no_checkpoint(repo, names)


def _indexed(repo: str, index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise PinferError(f"{index.name} of {repo} is damaged", "use another repository") from None


def _cached_checkpoint(repo: str, cached: Mapping[str, Path]) -> Path:
    """Folder of the checkpoint in the cache, if one snapshot has all of its files."""
    config = cached.get("config.json")
    if config is None:
        raise _no_checkpoint(repo, cached)
    here = {name for name, path in cached.items() if path == config.parent / name}
    missing = [name for name in _weights(repo, here, config.parent) if name not in here]
    if missing:
        raise PinferError(f"the cache lacks {missing[0]} of {repo}", "run the command once without --offline")
    return config.parent


def _no_checkpoint(repo: str, names: Iterable[str]) -> PinferError:
    if any(_is_model(name) for name in names):
        return PinferError(f"{repo} has GGUFs, not a checkpoint to convert", f"use it as it is: pinfer run -hf {repo}")
    return PinferError(f"{repo} has no checkpoint (config.json and safetensors)", "name another repository")
