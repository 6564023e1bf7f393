"""Models of the Hugging Face hub: which files of a repository make the model that ``-hf`` names, and where they lie."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pinfer.errors import PinferError
from pinfer.hub.fetch import cached_files, explain, fetch_files, is_offline
from pinfer.progress import NULL_PROGRESS, Progress

_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<wanted>[^:]+))?")
_PART = re.compile(r"-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf$", re.IGNORECASE)
_QUANT = re.compile(r"[-.](?P<quant>[A-Za-z0-9_]+)$")

# Without a quant it is the one that llama.cpp takes; without any of these, the first file.
_DEFAULT_QUANTS = ("Q4_K_M", "Q8_0")
# GGUFs that go with a model and are none: projectors, statistics for quantising, small models that guess ahead.
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
)


@dataclass(frozen=True)
class HubName:
    """``user/repo``, and the quant or file behind the colon."""

    repo: str
    wanted: str = ""

    def __str__(self) -> str:
        return f"{self.repo}:{self.wanted}" if self.wanted else self.repo


def parse_name(text: str) -> HubName:
    """``user/repo``, ``user/repo:q4_0`` or ``user/repo:model-q4_0.gguf``. Raises PinferError for anything else."""
    match = _NAME.fullmatch(text)
    if match is None:
        raise PinferError(
            f"{text!r} names no model of the hub", "write it like -hf user/repo, -hf user/repo:q4_0 or user/repo:FILE"
        )
    return HubName(match["repo"], match["wanted"] or "")


def fetch_gguf(name: str, progress: Progress = NULL_PROGRESS, *, offline: bool = False) -> Path:
    """The GGUF that ``name`` stands for (see ``parse_name``), in the hub's cache, fetched if it is not there.

    With ``offline``, or where the hub cannot be reached, it is what the cache has. Raises PinferError.
    """
    which = parse_name(name)
    cached = cached_files(which.repo)
    if offline or is_offline():
        return cached[choose_gguf(_known(which.repo, cached), which)]
    try:
        names = _list_files(which.repo)
    except Exception as error:  # whatever its HTTP client of the day raises
        return _from_cache(cached, which, error, progress)
    chosen = choose_gguf(names, which)
    try:
        return fetch_files(which.repo, [chosen], Path(chosen).name, progress)[0]
    except Exception as error:
        if chosen in cached:
            return _from_cache({chosen: cached[chosen]}, HubName(which.repo, chosen), error, progress)
        raise explain(error, which.repo, chosen) from error


def fetch_checkpoint(repo: str, progress: Progress = NULL_PROGRESS, *, offline: bool = False) -> Path:
    """Folder in the hub's cache with a checkpoint as its makers published it: config.json, weights, tokenizer.

    Weights are safetensors, or pickled ones where there are no others. With ``offline``, or where the hub cannot be
    reached, it is what the cache has, if that is whole. Raises PinferError.
    """
    which = parse_name(repo)
    if which.wanted:
        raise PinferError(f"a checkpoint is a whole repository, {which} names a part of it", f"write {which.repo}")
    cached = cached_files(which.repo)
    try:
        names: Iterable[str] = _known(repo, cached) if offline or is_offline() else _list_files(repo)
    except PinferError:
        raise
    except Exception as error:
        if "config.json" not in cached:
            raise explain(error, repo) from error
        progress.note(f"{explain(error, repo).message}; taking what the cache has")
        offline = True
    if offline or is_offline():
        return _cached_checkpoint(repo, cached)
    names = set(names)
    if "config.json" not in names:
        raise _no_checkpoint(repo, names)
    try:
        # The first file tells the commit; the others are taken from the same one.
        config = fetch_files(repo, ["config.json"], "config.json", progress)[0]
        commit = config.parent.name

        def fetch(wanted: Sequence[str], label: str) -> None:
            fetch_files(repo, wanted, label, progress, revision=commit)

        index = next((name for name in _INDICES if name in names), None)
        if index is not None and not _single_file(names, index):
            fetch([index], index)
        fetch(_weights(repo, names, config.parent) + _tokenizer(names), repo)
    except PinferError:
        raise
    except Exception as error:
        raise explain(error, repo) from error
    return config.parent


def choose_gguf(names: Iterable[str], which: HubName) -> str:
    """The file among ``names`` that is meant, as llama.cpp chooses. Raises PinferError when there is none."""
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
    first = found[0]
    if part := _PART.search(first):
        raise PinferError(
            f"{first} of {which.repo} is one of {int(part['count'])} parts",
            f"fetch them (hf download {which.repo} --include '{_PART.sub('', first)}*' --local-dir .) and join them: "
            "llama-gguf-split --merge FIRST_PART whole.gguf",
        )
    return first


def _is_model(name: str) -> bool:
    base = name.rpartition("/")[2].lower()
    part = _PART.search(base)
    is_later_part = part is not None and int(part["part"]) != 1
    return base.endswith(".gguf") and not is_later_part and not any(word in base for word in _COMPANIONS)


def _of_quant(names: Iterable[str], quant: str) -> list[str]:
    """Files with the quant in their name as a word: F16 is not found in BF16."""
    pattern = re.compile(rf"(?<![A-Za-z0-9]){re.escape(quant)}[.-]", re.IGNORECASE)
    return [name for name in names if pattern.search(name)]


def _nothing_fits(names: Iterable[str], models: Iterable[str], which: HubName) -> PinferError:
    stems = [_PART.sub("", name).removesuffix(".gguf") for name in models]
    quants = [match["quant"] if (match := _QUANT.search(stem)) else stem for stem in stems]
    if quants:
        there = ", ".join(quants[:12]) + (", …" if len(quants) > 12 else "")
        return PinferError(f"{which.repo} has no GGUF {which.wanted}", f"name one that it has: {there}")
    if any(name.endswith(".safetensors") or Path(name).match("pytorch_model*.bin") for name in names):
        return PinferError(
            f"{which.repo} has no GGUF but a checkpoint", f"make a GGUF: pinfer convert -hf {which.repo}"
        )
    return PinferError(f"{which.repo} has no GGUF", "name another repository")


def _known(repo: str, cached: Mapping[str, Path]) -> Iterable[str]:
    if not cached:
        raise PinferError(f"the cache has nothing of {repo}", "run the command without --offline (HF_HUB_OFFLINE) once")
    return cached


def _from_cache(cached: Mapping[str, Path], which: HubName, error: Exception, progress: Progress) -> Path:
    """What the cache has, where the hub does not answer; its error where that is nothing."""
    cause = explain(error, which.repo)
    try:
        path = cached[choose_gguf(cached, which)]
    except PinferError:
        raise cause from error
    progress.note(f"{cause.message}; taking {path.name} from the cache")
    return path


def _list_files(repo: str) -> list[str]:
    from huggingface_hub import HfApi, constants

    api = HfApi(library_name="pinfer")
    found = api.model_info(repo, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    return [file.rfilename for file in found.siblings or []]


# Of the files that tell which shards there are, the first that a repository has is used.
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def _single_file(names: Iterable[str], index: str) -> bool:
    """Whether the weights are in one file after all."""
    return index.removesuffix(".index.json") in names


def _weights(repo: str, names: Iterable[str], folder: Path) -> list[str]:
    """Files of the weights: one file, else what the index names, else every one at the top; safetensors first."""
    names = set(names)
    for index, pattern in zip(_INDICES, ("*.safetensors", "pytorch_model*.bin"), strict=True):
        whole = index.removesuffix(".index.json")
        if whole in names:
            return [whole]
        if index in names:
            return _indexed(repo, folder / index)
        at_top = sorted(name for name in names if "/" not in name and Path(name).match(pattern))
        if at_top:
            return at_top
    raise _no_checkpoint(repo, names)


def _indexed(repo: str, index: Path) -> list[str]:
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise PinferError(f"{index.name} of {repo} cannot be read", "the repository is damaged; use another") from None
    return shards


def _tokenizer(names: Iterable[str]) -> list[str]:
    names = set(names)
    return [name for name in (*_TOKENIZER_FILES, "generation_config.json") if name in names]


def _cached_checkpoint(repo: str, cached: Mapping[str, Path]) -> Path:
    """The checkpoint in the cache, if every file of it is in one snapshot."""
    config = cached.get("config.json")
    if config is None:
        raise _no_checkpoint(repo, cached)
    here = {name for name, path in cached.items() if path == config.parent / name}
    missing = [name for name in _weights(repo, here, config.parent) if name not in here]
    if missing:
        raise PinferError(f"the cache lacks {missing[0]} of {repo}", "run the command without --offline once")
    return config.parent


def _no_checkpoint(repo: str, names: Iterable[str]) -> PinferError:
    if any(_is_model(name) for name in names):
        return PinferError(f"{repo} has GGUFs, and no checkpoint to convert", f"use it as it is: pinfer run -hf {repo}")
    return PinferError(f"{repo} has no checkpoint: config.json and safetensors are wanted", "name another repository")
