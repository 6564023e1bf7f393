"""Artefacts: what is written comes back, what is broken is refused, what fails leaves the old file whole."""

from __future__ import annotations

import fcntl
import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.small_model import Shape, write_small_model

from pinfer.artefacts import paths
from pinfer.artefacts.artefact import FORMAT_VERSION, ArtefactWriter, open_artefact, verify_artefact
from pinfer.errors import PinferError
from pinfer.gguf_io.writer import replace_together
from pinfer.llama.plugin import load_plugin
from pinfer.model import Model, open_model
from pinfer.progress import NULL_PROGRESS
from pinfer.solve import SolveOptions, solve
from pinfer.split import SplitOptions, split


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return open_model(write_small_model(tmp_path / "model.gguf", Shape(n_layer=1)))


def _write(path: Path, model: Model, value: int = 1) -> None:
    with ArtefactWriter(path, "profile", model, {"value": value}) as out:
        out.add_array("blk.0.count", np.full(model.n_ff, value, np.int64))


def test_everything_written_comes_back(tmp_path: Path, model: Model) -> None:
    path = tmp_path / "some" / "profile.gguf"
    with ArtefactWriter(path, "profile", model, {"dataset": "é", "n": 3}, alignment=4096) as out:
        out.add_str("pinfer.text", "two words")
        out.add_str("pinfer.empty", "")
        out.add_u32("pinfer.small", 7)
        out.add_u64("pinfer.large", 1 << 60)
        out.add_f32("pinfer.real", 0.5)
        out.add_u32_array("pinfer.counts", [1, 2, 3])
        out.add_f32_array("pinfer.reals", [1, 2])
        out.add_str_array("pinfer.names", ["a", "b"])
        out.add_array("kept", np.arange(5, dtype=np.int32))
        out.declare("streamed", (3, 4), "F16")
        out.add_array("last", np.array([[1.0, 2.0]]))
        for row in range(4):
            out.write("streamed", np.full(3, row, np.float16))
    file = open_artefact(path, "profile", model)
    assert file.settings == {"dataset": "é", "n": 3}
    assert file.get_str("pinfer.text") == "two words"
    assert file.get_str("pinfer.empty") == ""
    assert (file.get_int("pinfer.small"), file.get_int("pinfer.large")) == (7, 1 << 60)
    assert file.get_float("pinfer.real") == 0.5
    assert file.get_list("pinfer.counts", 3) == [1, 2, 3]
    assert file.get_list("pinfer.reals", 2) == [1.0, 2.0]
    assert file.get_list("pinfer.names", 2) == ["a", "b"]
    assert file.array("kept").tolist() == [0, 1, 2, 3, 4]
    assert file.array("streamed", (3, 4), "F16").tolist() == [[r] * 3 for r in range(4)]
    assert file.array("last").tolist() == [[1.0, 2.0]]
    assert all(t.offset % 4096 == 0 for t in file.gguf.tensors.values())
    # The reference reader agrees.
    reader = gguf.GGUFReader(path)
    assert [t.name for t in reader.tensors] == ["kept", "streamed", "last"]
    assert reader.fields["pinfer.format_version"].contents() == FORMAT_VERSION
    assert json.loads(reader.fields["pinfer.settings"].contents()) == {"dataset": "é", "n": 3}
    assert reader.tensors[1].data.tolist() == [[r] * 3 for r in range(4)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=5))
def test_pieces_of_any_length_make_the_tensor(tmp_path: Path, model: Model, cuts: list[list[int]]) -> None:
    path = tmp_path / "any.gguf"
    with ArtefactWriter(path, "profile", model, {}) as out:
        for i, pieces in enumerate(cuts):
            out.declare(f"t{i}", (sum(pieces),), "I8")
        for i, pieces in enumerate(cuts):
            for j, n in enumerate(pieces):
                out.write(f"t{i}", np.full(n, j, np.int8))
    file = open_artefact(path, "profile", model)
    for i, pieces in enumerate(cuts):
        assert file.array(f"t{i}").tolist() == [j for j, n in enumerate(pieces) for _ in range(n)]


def test_misuse_is_noticed(tmp_path: Path, model: Model) -> None:
    path = tmp_path / "x.gguf"
    out = ArtefactWriter(path, "profile", model, {})
    out.declare("a", (4,), "I8")
    out.declare("b", (4,), "I8")
    with pytest.raises(ValueError, match="not the tensor that is due"):
        out.write("b", np.zeros(4, np.int8))
    with pytest.raises(ValueError, match="too many"):
        out.write("a", np.zeros(5, np.int8))
    out.write("a", np.zeros(4, np.int8))
    with pytest.raises(ValueError, match="b was declared but not written"):
        out.finish()
    out.discard()
    assert list(tmp_path.glob(".*")) == []


def test_an_exception_leaves_the_old_file_and_no_trace(tmp_path: Path, model: Model) -> None:
    path = tmp_path / "profile.gguf"
    _write(path, model)
    before = path.read_bytes()

    def interrupted() -> None:
        with ArtefactWriter(path, "profile", model, {}) as out:
            out.declare("a", (1000,), "I8")
            out.write("a", np.zeros(500, np.int8))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["model.gguf", "profile.gguf"]


def test_files_that_belong_together_are_replaced_together(tmp_path: Path, model: Model) -> None:
    hot, cold = tmp_path / "hot.gguf", tmp_path / "cold.gguf"
    for path in (hot, cold):
        _write(path, model)
    before = hot.read_bytes(), cold.read_bytes()
    first, second = (ArtefactWriter(p, "profile", model, {}) for p in (hot, cold))
    second.declare("a", (4,), "I8")
    with pytest.raises(ValueError, match="a was declared but not written"), first, second:
        replace_together((first, second))
    assert (hot.read_bytes(), cold.read_bytes()) == before
    assert sorted(p.name for p in tmp_path.glob(".*.tmp")) == []


def test_leftovers_of_killed_commands_go_and_those_in_use_stay(tmp_path: Path, model: Model) -> None:
    path = tmp_path / "profile.gguf"
    leftover = tmp_path / ".profile.gguf.0123abcd.tmp"
    in_use = tmp_path / ".profile.gguf.4567cdef.tmp"
    for name in (leftover, in_use):
        name.touch()
    with in_use.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _write(path, model)
        assert not leftover.exists()
        assert in_use.exists()
    _write(path, model)
    assert not in_use.exists()


def test_every_tensor_has_its_checksum(tmp_path: Path, model: Model) -> None:
    path = tmp_path / "profile.gguf"
    _write(path, model)
    file = open_artefact(path, "profile", model)
    assert file.get_list("pinfer.checksums", 1) == [load_plugin().checksum(np.full(model.n_ff, 1, np.int64))]
    verify_artefact(path, "profile", model)
    tensor = file.tensor("blk.0.count")
    with path.open("r+b") as out:
        out.seek(tensor.offset + 100)
        out.write(b"\x05")
    with pytest.raises(PinferError, match=r"damaged: .*blk.0.count .* checksum; make it again: pinfer profile"):
        verify_artefact(path, "profile", model)
    with ArtefactWriter(path, "cold", model, {}):
        pass
    verify_artefact(path, "cold", model)


_HOLDS_THE_LOCK = """
import sys
from pathlib import Path
from pinfer.artefacts import paths
from pinfer.model import open_model
with paths.writing_to(open_model(Path(sys.argv[1]))) as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_one_command_at_a_time_writes_to_a_folder(model: Model) -> None:
    command = [sys.executable, "-c", _HOLDS_THE_LOCK, str(model.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        folder = Path(other.stdout.readline().strip())
        for stage in (lambda: split(model.path, SplitOptions()), lambda: solve(model.path, SolveOptions(vram=0))):
            with pytest.raises(
                PinferError, match=f"another pinfer command is writing to {folder}; wait until"
            ) as error:
                stage()
            assert "\n" not in str(error.value)
        # The lock goes with its process, however that ends.
        other.kill()
    with paths.writing_to(model) as found:
        assert found == folder


def test_a_link_is_written_beside_its_target_and_that_is_said(tmp_path: Path, model: Model) -> None:
    notes: list[str] = []

    class Noting:
        task = staticmethod(NULL_PROGRESS.task)

        def note(self, text: str) -> None:
            notes.append(text)

    (tmp_path / "elsewhere").mkdir()
    link, beside = tmp_path / "elsewhere" / "link.gguf", tmp_path / "same.gguf"
    for name in (link, beside):
        name.symlink_to(model.path)
    with paths.writing_to(open_model(link), Noting()) as folder:
        assert folder == tmp_path / "model.gguf.pinfer"
    with paths.writing_to(model, Noting()):
        pass
    assert notes == [f"{link} is a link: writing to {folder}, beside the file it names"]


def test_without_pinfer_home_it_is_the_users_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PINFER_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert paths.pinfer_home() == tmp_path / "data" / "pinfer"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.pinfer_home() == tmp_path / ".local" / "share" / "pinfer"


def test_free_space_is_checked_before_anything_is_written(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "profile.gguf"
    _write(path, model)
    before = path.read_bytes()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(PinferError, match=r"profile.gguf needs 0.0 MB.*free some space"):
        _write(path, model, 2)
    assert path.read_bytes() == before


def test_a_write_that_fails_midway_is_one_line(tmp_path: Path, model: Model) -> None:
    """RLIMIT_FSIZE makes write(2) fail with EFBIG, as a full disk makes it fail with ENOSPC."""
    path = tmp_path / "profile.gguf"
    _write(path, model)
    before = path.read_bytes()

    def write_four_mebibytes() -> None:
        with ArtefactWriter(path, "profile", model, {}) as out:
            out.declare("a", (4 << 20,), "I8")
            for _ in range(4):
                out.write("a", bytes(1 << 20))

    limit, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
    try:
        with pytest.raises(PinferError, match="no space left while writing"):
            write_four_mebibytes()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == before
    assert list(tmp_path.glob(".*.tmp")) == []


def _renamed(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


def test_what_cannot_be_used_is_refused_with_the_mending_command(tmp_path: Path, model: Model) -> None:
    path = tmp_path / "profile.gguf"
    mend = f"pinfer profile {model.path}"
    with pytest.raises(PinferError, match="has no profile yet") as missing:
        open_artefact(path, "profile", model)
    assert mend in missing.value.hint

    _write(path, model)
    with pytest.raises(PinferError, match="holds a profile, not a placement") as wrong_kind:
        open_artefact(path, "placement", model)
    assert f"pinfer solve {model.path}" in wrong_kind.value.hint

    other = open_model(write_small_model(tmp_path / "other.gguf", Shape(n_layer=1, seed=1)))
    with pytest.raises(PinferError, match=r"made from another model \(model.gguf\) than .*other.gguf"):
        open_artefact(path, "profile", other)

    with pytest.raises(PinferError, match=r"made for activation reglu, model.gguf is run with drelu"):
        open_artefact(path, "profile", open_model(model.path, "drelu"))

    key, found = b"pinfer.format_version" + (4).to_bytes(4, "little"), FORMAT_VERSION
    for other_version in (FORMAT_VERSION - 1, FORMAT_VERSION + 1):
        _renamed(path, key + found.to_bytes(4, "little"), key + other_version.to_bytes(4, "little"))
        found = other_version
        said = f"has format version {other_version}, this pinfer has {FORMAT_VERSION}"
        with pytest.raises(PinferError, match=said) as version:
            open_artefact(path, "profile", model)
        assert mend in version.value.hint
    shutil.copy(model.path, path)
    with pytest.raises(PinferError, match="is not a profile of pinfer"):
        open_artefact(path, "profile", model)


def test_truncated_anywhere_is_one_line(tmp_path: Path, model: Model) -> None:
    path = tmp_path / "profile.gguf"
    _write(path, model)
    whole = path.read_bytes()
    for size in np.random.default_rng(0).integers(0, len(whole), 200):
        path.write_bytes(whole[:size])
        with pytest.raises(PinferError, match=r"is damaged: .*make it again: pinfer profile") as error:
            open_artefact(path, "profile", model)
        assert "\n" not in str(error.value)


def test_content_that_makes_no_sense_is_damage(tmp_path: Path, model: Model) -> None:
    path = tmp_path / "profile.gguf"
    _write(path, model)
    file = open_artefact(path, "profile", model)
    for ask in (
        lambda: file.get_int("pinfer.kind"),
        lambda: file.get_list("pinfer.ffns", 2),
        lambda: file.array("blk.9.count"),
        lambda: file.array("blk.0.count", (3,)),
        lambda: file.array("blk.0.count", type_name="F32"),
    ):
        with pytest.raises(PinferError, match="is damaged"):
            ask()


def test_artefacts_lie_beside_the_model(tmp_path: Path, model: Model) -> None:
    beside = tmp_path / "model.gguf.pinfer"
    assert paths.artefact_dir(model.path, model.fingerprint, for_writing=False) == beside
    assert not beside.exists()
    assert paths.artefact_dir(model.path, model.fingerprint, for_writing=True) == beside
    assert beside.is_dir()


def test_artefacts_go_home_where_the_model_lies_in_a_folder_that_cannot_be_written(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("PINFER_HOME", str(home))
    # Root may write everywhere, so a file in the folder's place stands for a folder that cannot be made.
    (tmp_path / "model.gguf.pinfer").touch()
    expected = home / f"model.gguf-{model.fingerprint[:12]}"
    assert paths.artefact_dir(model.path, model.fingerprint, for_writing=True) == expected
    assert paths.artefact_dir(model.path, model.fingerprint, for_writing=False) == expected
    # Neither place will do.
    monkeypatch.setenv("PINFER_HOME", "/proc/1/nowhere")
    with pytest.raises(PinferError, match=r"cannot write to .*model.gguf.pinfer .*nor to /proc/1.*PINFER_HOME=FOLDER"):
        paths.artefact_dir(model.path, model.fingerprint, for_writing=True)
