"""Measures `pinfer serve` against stock llama-server: prints the table of docs/benchmarks.md.

``python tools/measure_serve.py model.gguf --draft draft.gguf`` after ``pinfer prepare model.gguf`` and
``ninja -C build/native stock``. All servers are started first and take turns, a round of each case at a time; those
that do not have their turn are stopped, since idle threads may spin. Stock gets its best number of threads, -fa and
wait policy, which are found before; pinfer gets the same threads and -fa.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from pinfer.artefacts.paths import pinfer_home
from pinfer.benchmark.machine import cpu_time, describe, used_by_others
from pinfer.benchmark.process import WAIT_VARIABLES
from pinfer.benchmark.text import TEXT
from pinfer.llama.devices import physical_cores
from pinfer.llama.plugin import native_folder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.server import PINFER, Server, serving

SLOTS = 4
PROMPT_WORDS = 24
# Tokens a draft model proposes at a time; batches this long are still computed sparsely.
DRAFTED = 4


@dataclass(frozen=True)
class Side:
    """A server: pinfer's or stock's, its wait policy (None: libgomp's default) and whether it has a draft model."""

    name: str
    program: tuple[str, ...]
    policy: str | None = None
    draft: bool = False


@dataclass(frozen=True)
class Case:
    """So many clients at once, on a quiet machine or beside a process that never sleeps."""

    clients: int
    busy: bool = False

    @property
    def name(self) -> str:
        return f"{self.clients} client{'s' * (self.clients > 1)}" + (", busy" if self.busy else "")


@dataclass(frozen=True)
class Result:
    """Tokens per second of all clients together, one value per repetition."""

    side: str
    case: str
    speeds: tuple[float, ...]
    ratios: tuple[float, ...]
    """to stock without a draft model in the same repetition"""
    accepted: float | None
    """share of the drafted tokens that were right"""


CASES = (Case(1), Case(4), Case(1, busy=True))


def stock_side(policy: str | None, name: str = "stock", *, draft: bool = False) -> Side:
    return Side(name, (str(native_folder() / "bin" / "llama-server"), "-m"), policy, draft)


def sides_of(policy: str | None, with_draft: bool) -> tuple[Side, ...]:
    """Stock with its best wait policy comes first: the others are compared with it."""
    other = None if policy else "passive"
    sides = [
        stock_side(policy),
        stock_side(other, f"stock, {other or 'default'} waiting"),
        Side("pinfer", PINFER),
        Side("pinfer, active waiting", PINFER, "active"),
        Side("pinfer, passive waiting", PINFER, "passive"),
    ]
    if with_draft:
        sides += [stock_side(policy, "stock, draft", draft=True), Side("pinfer, draft", PINFER, draft=True)]
    return tuple(sides)


def prompts(n: int) -> list[str]:
    """Different pieces of prose."""
    words = TEXT.split()
    return [" ".join(words[i * PROMPT_WORDS : (i + 1) * PROMPT_WORDS]) for i in range(n)]


@contextmanager
def started(side: Side, arguments: argparse.Namespace, flags: Sequence[str], folder: Path) -> Iterator[Server]:
    """The side's server, stopped until its turn."""
    words = [*flags, "-np", str(SLOTS), "-c", str(SLOTS * (arguments.tokens + 128)), "--no-warmup"]
    if side.draft:
        words += ["-md", str(arguments.draft), "--spec-draft-n-max", str(DRAFTED)]
        if side.program is not PINFER:
            words += ["--spec-type", "draft-simple"]  # pinfer sets it by itself
    env = {"PINFER_HOME": str(pinfer_home())} | ({"OMP_WAIT_POLICY": side.policy} if side.policy else {})
    with serving(folder, arguments.model, *words, program=side.program, env=env, seconds=900) as server:
        server.process.send_signal(signal.SIGSTOP)
        yield server


def answer(server: Server, prompt: str, n_tokens: int) -> tuple[int, int, int]:
    """Tokens generated, drafted and accepted."""
    body = {"prompt": prompt, "n_predict": n_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    status, done = server.request("/completion", body, timeout=3600)
    assert status == 200, done
    timings = done["timings"]
    return timings["predicted_n"], timings.get("draft_n", 0), timings.get("draft_n_accepted", 0)


def measure(server: Server, case: Case, n_tokens: int) -> tuple[float, int, int]:
    """Tokens per second from the first request to the last answer; tokens drafted and accepted."""
    server.process.send_signal(signal.SIGCONT)
    try:
        with beside_a_spinning_process(case.busy), ThreadPoolExecutor(case.clients) as clients:
            begin = time.monotonic()
            done = list(clients.map(lambda prompt: answer(server, prompt, n_tokens), prompts(case.clients)))
            seconds = time.monotonic() - begin
    finally:
        server.process.send_signal(signal.SIGSTOP)
    generated, drafted, accepted = (sum(column) for column in zip(*done, strict=True))
    return generated / seconds, drafted, accepted


@contextmanager
def beside_a_spinning_process(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def best_settings(arguments: argparse.Namespace, folder: Path) -> tuple[list[str], str | None]:
    """The number of threads, -fa and wait policy with which stock decodes one sequence fastest."""
    threads = {arguments.threads} if arguments.threads else {physical_cores(), len(os.sched_getaffinity(0))}
    tried: list[tuple[float, list[str], str | None]] = []
    for n, attention, policy in itertools.product(sorted(threads), ("on", "off"), (None, "passive")):
        flags = ["-t", str(n), "-fa", attention]
        with started(stock_side(policy), arguments, flags, folder) as server:
            measure(server, CASES[0], 8)
            speed = median(measure(server, CASES[0], arguments.tokens)[0] for _ in range(3))
        print(f"stock {' '.join(flags)}, {policy or 'default'} waiting: {speed:.2f} t/s", file=sys.stderr, flush=True)
        tried.append((speed, flags, policy))
    _, flags, policy = max(tried, key=lambda one: one[0])
    return flags, policy


def run(arguments: argparse.Namespace, folder: Path) -> tuple[str, list[Result]]:
    """Stock's best settings, and what was measured."""
    flags, policy = best_settings(arguments, folder)
    sides = sides_of(policy, arguments.draft is not None)
    speeds: dict[tuple[Side, Case], list[float]] = {(side, case): [] for side in sides for case in CASES}
    drafted = dict.fromkeys(sides, (0, 0))
    with ExitStack() as stack:
        servers = {side: stack.enter_context(started(side, arguments, flags, folder)) for side in sides}
        for server in servers.values():
            measure(server, CASES[0], 8)  # loads what is loaded on first use
        for repetition in range(arguments.repetitions):
            for case in CASES:
                for i in range(len(sides)):
                    side = sides[(i + repetition) % len(sides)]
                    speed, n, n_accepted = measure(servers[side], case, arguments.tokens)
                    speeds[side, case].append(speed)
                    drafted[side] = drafted[side][0] + n, drafted[side][1] + n_accepted
                    print(f"{repetition + 1} {side.name}, {case.name}: {speed:.2f} t/s", file=sys.stderr, flush=True)
    results = []
    for (side, case), found in speeds.items():
        ratios = tuple(a / b for a, b in zip(found, speeds[sides[0], case], strict=True))
        n, n_accepted = drafted[side]
        results.append(Result(side.name, case.name, tuple(found), ratios, n_accepted / n if n else None))
    return f"{' '.join(flags)}, {policy or 'default'} waiting", results


def table(results: Sequence[Result]) -> list[str]:
    """Rows of Markdown: a side per row, speed and ratio per case."""
    lines = [
        "| server | " + " | ".join(f"{case.name}, t/s | ÷ stock" for case in CASES) + " | drafts accepted |",
        "|---" + "|---:" * (2 * len(CASES) + 1) + "|",
    ]
    for side in dict.fromkeys(result.side for result in results):
        own = [result for result in results if result.side == side]
        cells = [cell for result in own for cell in (_spread(result.speeds, 1), _spread(result.ratios, 2))]
        accepted = own[0].accepted
        lines.append(f"| {side} | {' | '.join(cells)} | {'' if accepted is None else f'{100 * accepted:.0f} %'} |")
    return lines


def _spread(values: Sequence[float], digits: int) -> str:
    """Median, smallest and largest."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def _own_cpu_time() -> float:
    """Seconds of this process and of those it has started and that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--draft", type=Path, help="a draft model with the same vocabulary")
    parser.add_argument("--tokens", type=int, default=64, help="per answer")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="default: the best of physical and logical cores")
    parser.add_argument("--json", action="store_true", help="also print every value")
    arguments = parser.parse_args()
    for name in WAIT_VARIABLES:
        os.environ.pop(name, None)  # each side has its own
    if not (native_folder() / "bin" / "llama-server").exists():
        sys.exit(f"llama-server is not built; type: ninja -C {native_folder()} stock")
    started_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    load = os.getloadavg()[0]
    before, own_before = cpu_time(), _own_cpu_time()
    with tempfile.TemporaryDirectory() as folder:
        settings, results = run(arguments, Path(folder))
    others = used_by_others(before, cpu_time(), _own_cpu_time() - own_before)
    environment = describe(int(settings.split()[1]), "", "", load, started_at, "")
    print(f"{arguments.model.name}, stock with {settings}, {arguments.tokens} tokens per answer, {environment.cpu},")
    print(f"commit {environment.commit}; other processes used {'?' if others is None else f'{others:.2f}'} CPUs")
    print()
    print("\n".join(table(results)))
    if arguments.json:
        print(json.dumps({"environment": asdict(environment), "results": [asdict(result) for result in results]}))


if __name__ == "__main__":
    main()
