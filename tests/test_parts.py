"""Models in several files: every command takes them by the first, and whatever does not belong together is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from support.command_line import ROOT, CommandLine
from support.small_model import Shape, write_small_model
from support.split_model import split_model

from pinfer.artefacts import paths
from pinfer.errors import PinferError
from pinfer.gguf_io.part_names import PartName, part_name
from pinfer.gguf_io.parts import read_model_file
from pinfer.gguf_io.reader import read_gguf
from pinfer.llama.plugin import load_plugin
from pinfer.model import open_model

TEXT = ROOT / "tests" / "data" / "profile.txt"
HELDOUT = ROOT / "tests" / "data" / "heldout.txt"


@pytest.fixture
def command(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path / "work", tmp_path / "home")


@pytest.fixture
def small(tmp_path: Path) -> list[Path]:
    """The three parts of a model that no one runs."""
    folder = tmp_path / "parts"
    folder.mkdir()
    return split_model(write_small_model(tmp_path / "small.gguf", Shape()), folder)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert part_name("Q4/m-00002-of-00003.gguf") == PartName("Q4/m", 2, 3)
    assert PartName("m", 2, 3).siblings() == [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert PartName("m", 2, 3).whole == "m.gguf"
    for name in ("m.gguf", "m-2-of-3.gguf", "-00001-of-00003.gguf", "m-00001-of-00003.gguf.pinfer"):
        assert part_name(name) is None


def test_the_parts_read_like_one_file(tiny_relu2: Path, tmp_path: Path) -> None:
    parts = split_model(tiny_relu2, tmp_path)
    whole, joined = read_gguf(tiny_relu2), read_model_file(parts[0])
    assert joined.size == sum(part.stat().st_size for part in parts)
    assert list(joined.tensors) == list(whole.tensors)
    assert {tensor.part for tensor in joined.tensors.values()} == {0, 1, 2}
    for name, tensor in whole.tensors.items():
        assert (joined.raw(joined.tensors[name]) == whole.raw(tensor)).all(), name
    norm = "output_norm.weight"
    assert (joined.array(joined.tensors[norm]) == whole.array(whole.tensors[norm])).all()
    for key in whole.keys():  # noqa: SIM118
        assert joined.get(key) == whole.get(key)
    joined.release()
    model = open_model(parts[0])
    single = open_model(tiny_relu2)
    assert (model.n_layer, model.n_ff, model.n_vocab) == (single.n_layer, single.n_ff, single.n_vocab)
    assert model.is_sparse


# --- the fingerprint --------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_content_of_all_parts(small: list[Path], tmp_path: Path) -> None:
    plugin = load_plugin()
    own = plugin.fingerprint(small[0])
    for number, part in enumerate(small, 1):
        elsewhere = tmp_path / f"other-0000{number}-of-00003.gguf"
        elsewhere.symlink_to(shutil.copy(part, tmp_path / str(number)))
    assert plugin.fingerprint(tmp_path / "other-00001-of-00003.gguf") == own
    seen = {own}
    for part in small:
        content = part.read_bytes()
        tensor = next(iter(read_gguf(part).tensors.values()))
        part.write_bytes(content[: tensor.offset] + bytes([content[tensor.offset] ^ 1]) + content[tensor.offset + 1 :])
        seen.add(plugin.fingerprint(small[0]))
        part.write_bytes(content + b"\0")
        seen.add(plugin.fingerprint(small[0]))
        part.write_bytes(content)
    assert len(seen) == 7
    assert plugin.fingerprint(small[0]) == own


# --- what does not belong together ------------------------------------------------------------------------------------


def _set_key(path: Path, key: str, value: int) -> None:
    reader = gguf.GGUFReader(path, "r+")
    reader.fields[key].parts[reader.fields[key].data[0]][0] = value


def _remove(parts: list[Path]) -> None:
    parts[1].unlink()


def _of_another_model(parts: list[Path]) -> None:
    folder = parts[0].parent
    other = write_small_model(folder / "small.gguf", Shape(n_layer=3))
    shutil.move(split_model(other, folder.parent)[2], parts[2])


def _swap(parts: list[Path]) -> None:
    parts[1].rename("kept")
    parts[2].rename(parts[1])
    Path("kept").rename(parts[2])


def _of_another_count(parts: list[Path]) -> None:
    _set_key(parts[2], "split.count", 4)


def _twice(parts: list[Path]) -> None:
    shutil.copy(parts[1], parts[2])
    _set_key(parts[2], "split.no", 2)


def _too_few(parts: list[Path]) -> None:
    _set_key(parts[0], "split.tensors.count", 99)


def _first_is_another(parts: list[Path]) -> None:
    shutil.copy(parts[1], parts[0])


def _break_header(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[1].read_bytes()[:60])


def _cut_off(parts: list[Path]) -> None:
    parts[2].write_bytes(parts[2].read_bytes()[:-4096])


def _folder(parts: list[Path]) -> None:
    parts[1].unlink()
    parts[1].mkdir()


ALL, ONE = "download all parts of one model again", "download this part again"


@pytest.mark.parametrize(
    ("damage", "message", "hint"),
    [
        (_remove, r"00002-of-00003\.gguf is missing: small-00001-of-00003\.gguf is the first of 3 parts", "one folder"),
        (_of_another_model, "the parts of .* are not of one model|is both in", ALL),
        (_swap, r"small-00002-of-00003\.gguf is part 3 of 3, not part 2 of 3", ALL),
        (_of_another_count, r"small-00003-of-00003\.gguf is part 3 of 4, not part 3 of 3", ALL),
        (_twice, r"tensor \S+ is both in small-00002-of-00003\.gguf and in small-00003-of-00003\.gguf", ALL),
        (_too_few, r"not of one model: they have \d+ tensors, not 99", ALL),
        (_first_is_another, r"small-00001-of-00003\.gguf is named as part 1, but it is part 2 of 3", ALL),
        (_break_header, r"cannot use .*small-00002-of-00003\.gguf: the header ends too early", ONE),
        (_cut_off, r"cannot use .*small-00003-of-00003\.gguf: it is cut off", ONE),
        (_folder, r"cannot read .*small-00002-of-00003\.gguf: Is a directory", "check its permissions"),
    ],
)
def test_parts_that_do_not_make_a_model(
    small: list[Path], damage: Callable[[list[Path]], None], message: str, hint: str
) -> None:
    damage(small)
    with pytest.raises(PinferError, match=message) as caught:
        open_model(small[0])
    assert caught.value.hint is not None
    assert hint in caught.value.hint
    assert "\n" not in str(caught.value)


def test_the_first_part_has_to_be_named(small: list[Path], command: CommandLine) -> None:
    for verb in ("show", "run"):
        done = command(verb, small[2])
        assert done.code == 1
        assert done.err_lines == [f"pinfer: {small[2]} is part 3 of 3; name the first: {small[0]}"]
    renamed = small[0].rename(small[0].with_name("small.gguf"))
    with pytest.raises(PinferError, match=r"under a name like NAME-00001-of-00003\.gguf") as caught:
        open_model(renamed)
    assert "names they were published with" in str(caught.value.hint)


def test_the_plugin_refuses_them_too(small: list[Path]) -> None:
    plugin = load_plugin()

    def refusals(path: Path) -> list[str]:
        said = []
        for ask in (lambda: plugin.fingerprint(path), lambda: plugin.configure(path, activation="reglu")):
            with pytest.raises(PinferError) as caught:
                ask()
            said.append(str(caught.value))
        return said

    assert all("is part 2 of 3 of a model; name the first part" in line for line in refusals(small[1]))
    small[1].write_bytes(b"GGUF")
    assert all(f"{small[1]} is not a GGUF file" in line for line in refusals(small[0]))
    small[1].unlink()
    assert all(f"{small[1]} is missing, one of the 3 parts" in line for line in refusals(small[0]))
    alone = small[0].rename(small[0].with_name("small.gguf"))
    assert all("its name does not end in -00001-of-00003.gguf" in line for line in refusals(alone))


# --- the commands -----------------------------------------------------------------------------------------------------


def _tensors(path: Path) -> dict[str, bytes]:
    file = read_gguf(path)
    return {name: file.raw(tensor).tobytes() for name, tensor in file.tensors.items()}


def test_every_command(tiny_reglu: Path, tmp_path: Path, command: CommandLine) -> None:
    """The artefacts hold the same numbers as those of the single file, and the text is the same."""
    whole, folder = tiny_reglu, tmp_path / "work"
    first = split_model(whole, folder)[0]
    outputs = []
    for model in (whole, first):
        for verb in (
            ("profile", "--dataset", TEXT, "--tokens", "2k", "-t", "1"),
            ("train",),
            ("solve", "--vram", "2M", "--device", "CPU"),
            ("split", "--verify"),
        ):
            done = command(verb[0], model, *verb[1:])
            assert done.code == 0, (verb, done.err)
        done = command("run", model, "-p", "Once upon a time", "-n", "24", "--temp", "0", "-t", "1", "--json")
        assert done.code == 0, done.err
        outputs.append(json.loads(done.out))
    assert outputs[0]["mode"] == outputs[1]["mode"] == "predicted"
    assert outputs[0]["text"] == outputs[1]["text"]
    made, of_parts = whole.with_name("tiny-reglu.gguf.pinfer"), folder / "tiny-reglu.gguf.pinfer"
    for name in (paths.PROFILE, paths.PREDICTOR, paths.SAMPLES):
        assert _tensors(of_parts / name) == _tensors(made / name), name

    dense = command("run", first, "--dense", "-p", "Once", "-n", "4", "--temp", "0", "-t", "1")
    assert dense.code == 0, dense.err
    shown = json.loads(command("show", first, "--json").out)
    assert (shown["mode"], shown["size"]) == ("predicted", sum(p.stat().st_size for p in folder.glob("*.gguf")))
    again = command("prepare", "--json")  # the only model here, and the last one used
    assert json.loads(again.out)["done"] == [], again.err
    evaluated = command("eval", first, "--text", HELDOUT, "--tokens", "128", "-c", "128", "-t", "1", "--json")
    assert evaluated.code == 0, evaluated.err
    (listed,) = json.loads(command("list", "--json").out)["models"]
    assert (listed["model"], listed["state"], listed["folder"]) == (str(first), "fresh", str(of_parts))
    assert command("rm", first, "--yes").code == 0
    assert not of_parts.exists() or not list(of_parts.rglob("*.gguf"))


def test_a_first_part_is_the_only_model_of_its_folder(tiny_relu2: Path, command: CommandLine) -> None:
    split_model(tiny_relu2, command.folder)
    shown = command("show", "--json")
    assert shown.code == 0, shown.err
    assert json.loads(shown.out)["model"] == "tiny-relu2-00001-of-00003.gguf"


def test_links_as_the_hub_makes_them(tiny_relu2: Path, tmp_path: Path, command: CommandLine) -> None:
    """Every part is a link to a file named by its hash, which the other parts are not beside by their names."""
    parts = split_model(tiny_relu2, command.folder)
    for digit, part in zip("cab", parts, strict=True):
        part.rename(tmp_path / (digit * 64))
        part.symlink_to(tmp_path / (digit * 64))
    quick = ("-t", "1", "-p", "16", "-n", "4", "-r", "1", "--json")
    done = command("bench", parts[0], *quick)
    assert done.code == 0, done.err
    made = command("prepare", parts[0], "--dataset", TEXT, "--tokens", "1k", "-t", "1", "--json")
    assert made.code == 0, made.err
    (listed,) = json.loads(command("list", "--json").out)["models"]
    assert (listed["name"], listed["state"]) == (parts[0].name, "fresh")
    assert listed["folder"].startswith(str(command.home / "hub-"))
