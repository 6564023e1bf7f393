"""What a start reads, maps and locks of a model whose FFN lies in shards, by the mappings of the process."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

import pytest
from support.server import serving
from support.shards import write_shards

from pinfer.artefacts import paths
from pinfer.model import open_model

PAGE = os.sysconf("SC_PAGESIZE")
FAULT_AROUND = 64 << 10
"""A page that is touched brings so many bytes around it with it."""


def mapped(pid: int, file: Path, field: str) -> int:
    """Bytes of a file's mappings in a process: Rss or Locked."""
    pieces = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text(), flags=re.MULTILINE)
    own = [piece for piece in pieces if piece.splitlines()[:1] and piece.splitlines()[0].endswith(f" {file}")]
    assert own, file
    values = (re.search(rf"^{field}: +(\d+) kB", piece, re.MULTILINE) for piece in own)
    return sum(int(value[1]) * 1024 for value in values if value)


def ffn_bytes(path: Path) -> int:
    return sum(ffn.n_bytes for ffn in open_model(path).ffns)


@pytest.mark.parametrize("shards", [False, True], ids=["alone", "shards"])
def test_a_start_reads_only_what_is_used(tiny_relu2: Path, tmp_path: Path, shards: bool) -> None:
    if shards:
        write_shards(tiny_relu2, 0.0)
    with serving(tmp_path, tiny_relu2, "--no-warmup", "-c", "64") as server:
        rss = mapped(server.process.pid, tiny_relu2, "Rss")
    size, ffn = tiny_relu2.stat().st_size, ffn_bytes(tiny_relu2)
    assert ffn > size / 2
    if shards:
        assert rss < size - ffn + open_model(tiny_relu2).n_layer * 3 * FAULT_AROUND, (rss, size, ffn)
    else:
        assert rss > size - ffn / 10


def test_mlock_locks_the_shard_and_not_the_ffn_of_the_model(tiny_relu2: Path, tmp_path: Path) -> None:
    write_shards(tiny_relu2, 0.0)
    cold = paths.artefact_dir(tiny_relu2, open_model(tiny_relu2).fingerprint, for_writing=False) / paths.COLD
    size, ffn = tiny_relu2.stat().st_size, ffn_bytes(tiny_relu2)
    with serving(tmp_path, tiny_relu2, "--load-mode", "mmap+mlock", "-c", "64") as server:
        locked = mapped(server.process.pid, cold, "Locked")
        of_model = mapped(server.process.pid, tiny_relu2, "Locked")
        log = server.log.read_text()
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if os.geteuid() == 0 or limit == resource.RLIM_INFINITY or limit > 2 * size:
        assert locked >= cold.stat().st_size - PAGE
        assert 0 < of_model < size - ffn + open_model(tiny_relu2).n_layer * 3 * PAGE
    else:
        assert "cannot be locked in memory" in log
