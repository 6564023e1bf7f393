"""Downloads from the Hugging Face hub: huggingface_hub does the work, pinfer shows progress and errors."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pinfer.errors import NO_SPACE, PinferError
from pinfer.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub import DryRunFileInfo

_TOKEN_HINT = "set HF_TOKEN to a token of an account that has access"
_SPACE_HINT = "free some space, or set HF_HOME to a folder on another disk"


def endpoint() -> str:
    """Address of the hub: ``$HF_ENDPOINT``, else the public one."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def is_offline() -> bool:
    """Whether the user has turned off network access with ``$HF_HUB_OFFLINE``."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def cached_files(repo: str, repo_type: str = "model") -> dict[str, Path]:
    """Cached files of a repository by their names in it, from the current commit where it has them, else an older one.

    ``repo_type`` is ``"model"`` or ``"dataset"``.
    """
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = scan_cache_dir().repos
    except (CacheNotFound, OSError):
        return {}
    revisions = [r for found in repos if (found.repo_id, found.repo_type) == (repo, repo_type) for r in found.revisions]
    found: dict[str, Path] = {}
    for revision in sorted(revisions, key=lambda r: ("main" in r.refs, r.last_modified), reverse=True):
        for file in revision.files:
            found.setdefault(file.file_path.relative_to(revision.snapshot_path).as_posix(), file.file_path)
    return found


def fetch_files(
    repo: str,
    names: Sequence[str],
    label: str,
    progress: Progress,
    *,
    repo_type: str = "model",
    revision: str | None = None,
) -> list[Path]:
    """Paths in the shared cache of files of ``repo``, in order; missing ones are downloaded.

    ``names`` is not empty; ``revision`` is a branch, tag or commit (None: the default branch). All files are taken from
    one commit. A broken connection is resumed. Complete files stay in the cache if a later one fails or Ctrl-C is
    pressed.

    Raises what huggingface_hub raises (``explain`` turns it into a message), and PinferError if the disk is too small.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    def ask(name: str, commit: str | None = revision, **options: Any) -> Any:
        return hf_hub_download(repo, name, repo_type=repo_type, revision=commit, library_name="pinfer", **options)

    def ask_all(**options: Any) -> list[Path]:
        return [Path(ask(names[0], **options)), *(Path(ask(name, commit, **options)) for name in names[1:])]

    with _library_log(progress):
        # fails at once without a network, where hf_hub_download would try again for half a minute
        url = hf_hub_url(repo, names[0], repo_type=repo_type, revision=revision)
        get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT, library_name="pinfer")
        infos: list[DryRunFileInfo] = [ask(name, dry_run=True) for name in names]
        commit = infos[0].commit_hash
        n_bytes = sum(info.file_size or 0 for info in infos if info.will_download)
        if not n_bytes:
            return ask_all()
        _check_space(Path(infos[0].local_path), n_bytes)
        try:
            with progress.task(f"fetching {label}", n_bytes, "bytes") as advance:
                return ask_all(tqdm_class=_bar(advance))
        except KeyboardInterrupt:
            progress.note("download stopped: complete files are kept, an incomplete one starts over next time")
            raise


def _check_space(target: Path, n_bytes: int) -> None:
    folder = next(path for path in target.parents if path.is_dir())
    if (free := shutil.disk_usage(folder).free) < n_bytes:
        raise PinferError(
            f"the download needs {n_bytes / 1e9:.2f} GB, {folder} has {free / 1e9:.2f} GB free", _SPACE_HINT
        )


def _bar(advance: Callable[[int], None]) -> type:
    """A progress bar class for huggingface_hub that draws nothing and calls ``advance`` with the bytes received."""
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            advance(int(n or 0))

        # The library counts bytes on the wire apart from bytes of the file if a bar has these two.
        def update_transfer(self, n: float | None = 1) -> None:
            pass

        def set_transfer_postfix_str(self, text: str = "", refresh: bool = True) -> None:
            pass

    return Bar


class _NoteHandler(logging.Handler):
    """Passes the library's warnings on as notes, so that they do not break the progress bar."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.note("hub: " + " ".join(record.getMessage().split())[:160])


@contextmanager
def _library_log(progress: Progress) -> Iterator[None]:
    log = logging.getLogger("huggingface_hub")
    handlers, log.handlers = log.handlers, [_NoteHandler(progress)]
    try:
        yield
    finally:
        log.handlers = handlers


def explain(error: Exception, repo: str, filename: str = "") -> PinferError:
    """An error of huggingface_hub or of the network as one line with a way out."""
    from huggingface_hub import errors

    if isinstance(error, PinferError):
        return error
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    what = f"{filename} of {repo}" if filename else repo
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return PinferError(f"no space left while downloading {what}", _SPACE_HINT)
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return PinferError(
            f"cannot write {error.filename} ({error.strerror})", "set HF_HOME to a folder that can be written"
        )
    if isinstance(error, errors.GatedRepoError):
        return PinferError(
            f"{repo} is gated: its terms have to be accepted first",
            f"accept them at {endpoint()}/{repo}, then {_TOKEN_HINT}",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return PinferError(f"there is no {repo} at {endpoint()}, or it is private", f"check the name, or {_TOKEN_HINT}")
    if isinstance(error, errors.EntryNotFoundError) and status == 404:
        return PinferError(f"there is no {what} at {endpoint()}", "check the name")
    if status in (401, 403):
        return PinferError(f"{endpoint()} refuses access to {what} (HTTP {status})", _TOKEN_HINT)
    if status is not None:
        return PinferError(f"{endpoint()} failed to serve {what} (HTTP {status})", "try again later")
    cause = " ".join(str(error).split())[:160] or type(error).__name__
    return PinferError(
        f"cannot download {what} from {endpoint()} ({cause})",
        "check the network and run the command again, or pass the path of a local GGUF",
    )
