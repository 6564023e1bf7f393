"""The report of `pinfer bench`: results by test and side, ratios, and the limits of the machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import fmean, median, stdev

from pinfer.benchmark.limit import TokenBytes
from pinfer.benchmark.machine import Environment

SPARSE, DENSE = "sparse", "dense"


@dataclass(frozen=True)
class Case:
    """A test: a prompt of ``n_prompt`` tokens, or decoding ``n_gen`` tokens of each of ``n_seq`` sequences."""

    n_prompt: int
    n_gen: int
    n_seq: int
    n_depth: int = 0
    """tokens that each sequence already has"""

    @property
    def name(self) -> str:
        """llama-bench's name with the number of sequences: ``pp512``, ``tg128``, ``tg128 ×4``, ``tg128 @ d2048``."""
        depth = f" @ d{self.n_depth}" if self.n_depth else ""
        if self.n_prompt:
            return f"pp{self.n_prompt}{depth}"
        return f"tg{self.n_gen}" + (f" ×{self.n_seq}" if self.n_seq > 1 else "") + depth

    @property
    def n_tokens(self) -> int:
        """Tokens processed in a run, over all sequences."""
        return self.n_prompt + self.n_gen * self.n_seq


@dataclass(frozen=True)
class Result:
    """One test on one side."""

    test: Case
    side: str
    """``sparse`` or ``dense``"""
    tokens_per_s: tuple[float, ...]
    """by repetition, over all sequences"""
    order: tuple[int, ...]
    """position of each repetition among all runs of the bench"""
    tokens_sha256: str
    computed: float | None
    """share of the CPU's neurons whose first product was computed; None if nothing was computed sparsely"""
    active: float | None
    """share that fired"""
    token_bytes: TokenBytes | None
    """what a token has to read; None for prompts and batches, and if a device reads weights as well"""
    hidden: float | None = None
    """share of the shorter side's time (device or CPU) that overlaps the longer side's; None without hot neurons"""
    no_flash: bool = False
    """measured without flash attention, which was slower"""

    @property
    def mean(self) -> float:
        return fmean(self.tokens_per_s)

    @property
    def sd(self) -> float:
        return stdev(self.tokens_per_s) if len(self.tokens_per_s) > 1 else 0.0

    @property
    def median(self) -> float:
        return median(self.tokens_per_s)


@dataclass(frozen=True)
class Ratio:
    """Speed of sparse over dense, one value per repetition, each from two runs that followed one another."""

    test: Case
    pairs: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.pairs)


@dataclass(frozen=True)
class Steps:
    """Milliseconds of a token, in means over a run of each kind."""

    test: Case
    token: float
    """the whole token, measured together with the FFNs"""
    ffn: dict[str, float]
    """the steps of all FFNs, as the thread that decodes sees them"""
    by_node: dict[str, float]
    """ggml's nodes, from a run that computes them one by one: each pays for waking the threads and waiting for them"""
    faults: float
    """page faults"""

    @property
    def rest(self) -> float:
        """What is not spent in FFNs: ggml's nodes and the scheduler."""
        return self.token - sum(self.ffn.values())


@dataclass(frozen=True)
class ModelFacts:
    """The model as libllama describes it."""

    filename: str
    name: str
    type: str
    size: int
    n_params: int
    activation: str


@dataclass(frozen=True)
class BenchReport:
    """What ``pinfer bench`` measured."""

    environment: Environment
    model: ModelFacts
    mode: str
    """``predicted``, ``exact``, or ``dense`` if only stock libllama ran"""
    tokens_from: str
    results: tuple[Result, ...]
    ratios: tuple[Ratio, ...]
    peak: dict[str, int]
    """VmHWM in bytes, by side"""
    recall: float | None
    """share of the activation mass that the predictor keeps, as measured in training"""
    candidates: float | None
    """share of neurons that the predictor names, as measured in training"""
    bandwidth: float
    """bytes per second"""
    others: float | None
    """CPUs that other processes kept busy during the bench"""
    notes: tuple[str, ...]
    steps: tuple[Steps, ...] = ()
    """where the time of decoding goes, if asked for"""

    def limit(self, result: Result) -> float | None:
        """Tokens per second if decoding only had to read its bytes."""
        return self.bandwidth / result.token_bytes.total if result.token_bytes is not None else None

    def ratio(self, test: Case) -> Ratio | None:
        """Sparse over dense in one test."""
        return next((r for r in self.ratios if r.test == test), None)

    @property
    def memory_ratio(self) -> float | None:
        """Peak of the sparse side over that of the dense one."""
        return self.peak[SPARSE] / self.peak[DENSE] if len(self.peak) == 2 else None

    def records(self) -> list[dict[str, object]]:
        """A flat record for each test and side, with build and machine in each, as in llama-bench."""
        return [self._record(result) for result in self.results]

    def _record(self, result: Result) -> dict[str, object]:
        ratio = self.ratio(result.test) if result.side == SPARSE else None
        limit = self.limit(result)
        return {
            **asdict(self.environment),
            **{f"model_{name}": value for name, value in asdict(self.model).items()},
            "test": result.test.name,
            "n_prompt": result.test.n_prompt,
            "n_gen": result.test.n_gen,
            "n_seq": result.test.n_seq,
            "n_depth": result.test.n_depth,
            "side": result.side,
            "no_flash": result.no_flash,
            "mode": self.mode if result.side == SPARSE else DENSE,
            "tokens_from": self.tokens_from,
            "tokens_sha256": result.tokens_sha256,
            "avg_ts": result.mean,
            "stddev_ts": result.sd,
            "median_ts": result.median,
            "samples_ts": list(result.tokens_per_s),
            "order": list(result.order),
            "ratio": ratio.median if ratio else None,
            "ratio_low": min(ratio.pairs) if ratio else None,
            "ratio_high": max(ratio.pairs) if ratio else None,
            "active": result.active,
            "computed": result.computed,
            "recall": self.recall if result.side == SPARSE else None,
            "peak_memory": self.peak[result.side],
            "bandwidth": self.bandwidth,
            "token_bytes": result.token_bytes.total if result.token_bytes else None,
            "limit_ts": limit,
            "limit_share": result.median / limit if limit else None,
            "cpus_used_by_others": self.others,
        }

    def to_json(self) -> dict[str, object]:
        """The report as plain JSON values."""
        return {
            "environment": asdict(self.environment),
            "model": asdict(self.model),
            "mode": self.mode,
            "tokens_from": self.tokens_from,
            "bandwidth": self.bandwidth,
            "recall": self.recall,
            "candidates": self.candidates,
            "peak_memory": self.peak,
            "memory_ratio": self.memory_ratio,
            "cpus_used_by_others": self.others,
            "notes": list(self.notes),
            "results": [
                {**self._record(r), "token_bytes_by_part": asdict(r.token_bytes) if r.token_bytes else None}
                for r in self.results
            ],
            "steps": [asdict(steps) for steps in self.steps],
            "ratios": [{"test": r.test.name, "median": r.median, "pairs": list(r.pairs)} for r in self.ratios],
        }
