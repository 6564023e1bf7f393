"""Files of the Hugging Face hub, fetched into the cache that all its users share.

The hub's library keeps that cache in order; it also drops what an interrupted download had fetched. Models are too
large for that, so here the data itself is fetched: into the place where the library looks for it, under the library's
own lock, resumed where an earlier command was stopped. The library then finds the data there and does the rest.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pinfer.errors import PinferError
from pinfer.progress import Progress

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SHA256 = re.compile(r"[0-9a-f]{64}")

# The hub hands out larger files by another protocol only; the library speaks it, and begins anew each time.
_LARGEST_BY_HTTP = 50 * 1000**3

_TOKEN_HINT = "set HF_TOKEN to a token of an account that has access"


@dataclass(frozen=True)
class HubFile:
    """One file of a repository."""

    repo: str
    filename: str
    repo_type: str = "model"
    revision: str | None = None
    """branch, tag or commit; None: main"""


@dataclass(frozen=True)
class _Blob:
    """Data of a file that the cache does not have yet."""

    url: str
    label: str
    path: Path
    lock: Path
    size: int | None

    @property
    def incomplete(self) -> Path:
        return self.path.with_name(f"{self.path.name}.incomplete")

    @property
    def n_there(self) -> int:
        """Bytes that an earlier command has left. Only what can be checked against a hash in the end is used."""
        if self.size is None or _SHA256.fullmatch(self.path.name) is None or not self.incomplete.is_file():
            return 0
        n = self.incomplete.stat().st_size
        return n if n <= self.size else 0


def endpoint() -> str:
    """Address of the hub: ``$HF_ENDPOINT``, or the library's own."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def is_offline() -> bool:
    """Whether the user has forbidden the network: ``$HF_HUB_OFFLINE``."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def cached_files(repo: str, repo_type: str = "model") -> dict[str, Path]:
    """What the cache has of a repository, by its name there: of the newest known commit, else of an older one."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type=repo_type)
    try:
        snapshots = sorted((folder / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return {}
    main = folder / "refs" / "main"
    if main.is_file():
        newest = main.read_text(encoding="utf-8").strip()
        snapshots.sort(key=lambda path: path.name != newest)
    found: dict[str, Path] = {}
    for snapshot in snapshots:
        for path in sorted(snapshot.rglob("*")):
            if path.is_file():
                found.setdefault(path.relative_to(snapshot).as_posix(), path)
    return found


def fetch_files(files: Sequence[HubFile], label: str, progress: Progress) -> list[Path]:
    """Files in the cache, fetched where they are not there yet, in the order asked for.

    Raises whatever the hub's library raises (see ``explain``), and PinferError when the disk is full.
    """
    from huggingface_hub import hf_hub_download

    blobs = [blob for file in files if (blob := _missing(file)) is not None]
    _check_space(blobs)
    with _quiet_library(progress):
        if blobs:
            _fetch_blobs(blobs, label, progress)
        return [
            Path(
                hf_hub_download(
                    file.repo,
                    file.filename,
                    repo_type=file.repo_type,
                    revision=file.revision,
                    library_name="pinfer",
                )
            )
            for file in files
        ]


def _fetch_blobs(blobs: Sequence[_Blob], label: str, progress: Progress) -> None:
    n_there = sum(blob.n_there for blob in blobs)
    total = sum(blob.size or 0 for blob in blobs)
    if n_there:
        progress.note(f"{label}: {100 * n_there / total:.0f} % are here already, from a download that was stopped")
    try:
        with progress.task(f"fetching {label}", total - n_there, "bytes") as advance:
            for blob in blobs:
                _fetch_blob(blob, advance)
    except KeyboardInterrupt:
        progress.note("stopped; the same command goes on where this one was")
        raise
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise _no_space(blobs[0].path) from error
        raise


def _missing(file: HubFile) -> _Blob | None:
    """What has to be fetched for a file; None where the cache has it."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import repo_folder_name

    url = hf_hub_url(file.repo, file.filename, repo_type=file.repo_type, revision=file.revision)
    found = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT, library_name="pinfer")
    if found.etag is None or found.commit_hash is None:
        raise PinferError(f"{endpoint()} does not answer like a model hub", "check HF_ENDPOINT and the network")
    cache = Path(constants.HF_HUB_CACHE)
    folder = repo_folder_name(repo_id=file.repo, repo_type=file.repo_type)
    path = cache / folder / "blobs" / found.etag
    at_commit = cache / folder / "snapshots" / found.commit_hash / file.filename
    too_large = found.size is not None and found.size > _LARGEST_BY_HTTP
    if path.exists() or at_commit.exists() or too_large:
        return None
    lock = cache / ".locks" / folder / f"{found.etag}.lock"
    return _Blob(url, Path(file.filename).name, path, lock, found.size)


def _check_space(blobs: Sequence[_Blob]) -> None:
    needed = sum((blob.size or 0) - blob.n_there for blob in blobs)
    if not needed:
        return
    folder = next(path for path in blobs[0].path.parents if path.is_dir())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise PinferError(
            f"the download needs {needed / 1e9:.2f} GB, {folder} has {free / 1e9:.2f} GB free",
            "free some space, or set HF_HOME to a folder on another disk",
        )


def _no_space(path: Path) -> PinferError:
    return PinferError(f"no space left in {path.parent}", "free some space, or set HF_HOME to a folder on another disk")


def _fetch_blob(blob: _Blob, advance: Callable[[int], None]) -> None:
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    blob.lock.parent.mkdir(parents=True, exist_ok=True)
    blob.path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(blob.lock):
        if blob.path.exists():  # another command has fetched it while this one waited
            advance((blob.size or 0) - blob.n_there)
            return
        n_there = blob.n_there
        with _CountedFile(blob.incomplete, n_there, advance) as file:
            http_get(
                blob.url,
                file,
                resume_size=n_there,
                # Packed on the way, data would have neither a size nor a middle to go on from.
                headers=build_hf_headers(library_name="pinfer") | {"Accept-Encoding": "identity"},
                expected_size=blob.size,
                displayed_filename=blob.label,
            )
            os.fsync(file.fileno())
        if n_there:
            _check_hash(blob)
        os.replace(blob.incomplete, blob.path)


def _check_hash(blob: _Blob) -> None:
    """Data from two downloads is one file only if its hash says so."""
    with blob.incomplete.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() == blob.path.name:
            return
    blob.incomplete.unlink()
    raise PinferError(f"{blob.label} arrived damaged and was removed", "run the command again to fetch it anew")


class _CountedFile(io.BufferedRandom):
    """A file that tells how far it has grown, or shrunk."""

    def __init__(self, path: Path, n_kept: int, advance: Callable[[int], None]) -> None:
        path.touch()
        super().__init__(io.FileIO(path, "r+"))
        super().truncate(n_kept)
        self.seek(n_kept)
        self._advance = advance

    def write(self, data: Any, /) -> int:
        n = super().write(data)
        self._advance(n)
        return n

    def truncate(self, size: int | None = None, /) -> int:
        before = self.seek(0, io.SEEK_END)
        n = super().truncate(size)
        self.seek(n)
        self._advance(n - before)
        return n


class _ToProgress(logging.Handler):
    """What the hub's library has to say, a line each, where it does not tear the bar apart."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.note("hub: " + " ".join(record.getMessage().split())[:160])


@contextmanager
def _quiet_library(progress: Progress) -> Iterator[None]:
    """The library's own bars and log are off: progress is drawn by whoever passed one."""
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    log = logging.getLogger("huggingface_hub")
    handlers, log.handlers = log.handlers, [_ToProgress(progress)]
    disable_progress_bars("huggingface_hub.http_get")
    try:
        yield
    finally:
        enable_progress_bars("huggingface_hub.http_get")
        log.handlers = handlers


def explain(error: Exception, repo: str, filename: str = "") -> PinferError:
    """An error of the hub's library, or of the network, as a cause and what to do."""
    from huggingface_hub import errors

    what = f"{filename} of {repo}" if filename else repo
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, PinferError):
        return error
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return PinferError(
            f"cannot write {error.filename} ({error.strerror})", "set HF_HOME to a folder that can be written"
        )
    if isinstance(error, errors.GatedRepoError):
        return PinferError(
            f"{repo} is gated: its owner wants its terms accepted first",
            f"accept them at {endpoint()}/{repo}, then {_TOKEN_HINT}",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return PinferError(f"there is no {repo} at {endpoint()}, or it is private", f"check the name, or {_TOKEN_HINT}")
    if isinstance(error, errors.EntryNotFoundError) and status == 404:
        return PinferError(f"there is no {what} at {endpoint()}", "check the name")
    if status in (401, 403):
        return PinferError(f"{endpoint()} refuses {what} (HTTP {status})", _TOKEN_HINT)
    if status is not None:
        return PinferError(f"{endpoint()} has a problem with {what} (HTTP {status})", "try again later")
    cause = " ".join(str(error).split())[:160] or type(error).__name__
    return PinferError(
        f"cannot get {what} from {endpoint()} ({cause})",
        "check the network and run the command again, or pass the path of a GGUF that is here",
    )
