"""Fits the predictor of a stack of experts: a copy of their first matrices in one or two bits a weight.

Expert matrices are close to full rank, so low-rank factors do not pay. Every expert is rounded for the inputs of all
tokens of its layer, which are many, and its thresholds are calibrated on the tokens that were routed to it, which are
few. An expert with too few tokens gets no thresholds: all its neurons stay candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pinfer.artefacts.predictor import FEW_BITS, LayerPredictor, packed
from pinfer.artefacts.profile import SamplesFile
from pinfer.model import Ffn, Model
from pinfer.predictors.data import HeldBack, LayerData
from pinfer.predictors.few_bits import Compensation, compensation, few_bits
from pinfer.predictors.fitting import BLOCK, MIN_SAMPLES, SCATTERED_COST, LayerReport, TrainOptions, exact_cost
from pinfer.predictors.low_rank import covariance
from pinfer.predictors.thresholds import calibrate

# Experts on which the kinds are compared.
_COMPARED = 4
# At most so many of the samples of an expert are used; the last of so many parts tests what the others calibrated.
_MAX_HELD = 2560
_TEST = 5
# Neurons scored at once by the plugin; experts are padded to it.
_TILE = 16
_THRESHOLD_BYTES = 4
_EVERY_NEURON = np.float32(-3e38)


class _Expert:
    """One expert with a predictor of one kind, calibrated and tested on the samples ``held`` that were routed to it."""

    def __init__(self, data: LayerData, held: HeldBack, how: Compensation, kind: str, recall: float) -> None:
        bits = FEW_BITS[kind]
        levels = few_bits(data.weight, how, bits)
        self.codes = packed(levels, bits)
        self.n_bytes = self.codes.nbytes + _THRESHOLD_BYTES * len(levels)
        scores = held.x @ levels.T
        cut = len(scores) - len(scores) // _TEST
        self.t = calibrate(scores[:cut], held.part(slice(cut)), data, recall)
        test = held.part(slice(cut, None))
        named = scores[cut:] > self.t
        self.n = len(named)
        self.named = int(np.count_nonzero(named))
        self.active = int(np.count_nonzero(test.mass))
        self.mass = float(test.mass.sum(dtype=np.float64))
        self.kept = float(test.mass.sum(where=named, dtype=np.float64))
        hits = int(np.count_nonzero(named & (test.mass > 0)))
        rows = (self.named * data.first_bytes + hits * data.rest_bytes) / self.n
        self.expected_bytes = self.n_bytes + rows
        self.cost = self.n_bytes + SCATTERED_COST * rows
        self.exact_cost = exact_cost(data, test)
        self.exact_bytes = len(levels) * data.first_bytes + self.active / self.n * data.rest_bytes


def fit_stack(
    model: Model, ffn: Ffn, samples: SamplesFile, options: TrainOptions, advance: Callable[[int], None]
) -> tuple[LayerPredictor, LayerReport]:
    """The predictor of a stack, or kind ``none`` if it does not pay; ``advance`` is called for every expert."""
    none = LayerPredictor(0, 1.0, 1.0, kind="none")
    report = LayerReport(ffn.layer, ffn.kind, "none", 0, 1.0, 1.0, 0.0, 0, 0.0, 0.0)
    routed = np.bincount(samples.experts(ffn).reshape(-1), minlength=ffn.n_experts)
    if ffn.n_embd % BLOCK or ffn.n_ff % _TILE or routed.max() < MIN_SAMPLES:
        advance(ffn.n_experts)
        return none, report
    how = compensation(covariance(samples.x(ffn).astype(np.float32)))

    def fit(expert: int, kinds: Iterable[str]) -> dict[str, _Expert]:
        data = LayerData.read(model, ffn, samples, expert)
        held = HeldBack.of(data, slice(-min(len(data.x), _MAX_HELD), None))
        model.gguf.release()  # the stacks of a model may be larger than memory
        return {kind: _Expert(data, held, how, kind, options.recall) for kind in kinds}

    trained = [int(e) for e in np.argsort(-routed, kind="stable") if routed[e] >= MIN_SAMPLES]
    compared = {expert: fit(expert, FEW_BITS) for expert in trained[:_COMPARED]}
    kind = min(FEW_BITS, key=lambda kind: math.fsum(of[kind].cost for of in compared.values()))
    known = {expert: of[kind] for expert, of in compared.items()}
    pays = math.fsum(e.cost for e in known.values()) < math.fsum(e.exact_cost for e in known.values())
    n_bytes = ffn.n_embd * FEW_BITS[kind] // 8
    codes = np.zeros((ffn.n_neurons, n_bytes), dtype=np.uint8)
    thresholds = np.full(ffn.n_neurons, _EVERY_NEURON, dtype=np.float32)
    for expert in trained if pays else ():
        fitted = known[expert] if expert in known else fit(expert, (kind,))[kind]
        own = slice(expert * ffn.n_ff, (expert + 1) * ffn.n_ff)
        codes[own], thresholds[own] = fitted.codes, fitted.t
        fitted.codes = codes[own]  # the experts together are large enough
        known[expert] = fitted
        advance(1)
    advance(ffn.n_experts - (len(trained) if pays else 0))
    report = _report(model, ffn, report, list(known.values()), routed)
    if not pays:
        exact = report.exact_bytes
        return none, replace(report, recall=1.0, candidates=1.0, predictor_bytes=0, expected_bytes=exact)
    predictor = LayerPredictor(ffn.n_embd, report.recall, report.candidates, None, codes, thresholds, kind)
    return predictor, replace(report, kind=kind, rank=ffn.n_embd)


def _report(model: Model, ffn: Ffn, empty: LayerReport, known: list[_Expert], routed: NDArray[np.intp]) -> LayerReport:
    """Shares of the neurons of routed experts; bytes of all experts of a token.

    Where an expert has no thresholds, all its neurons are candidates.
    """
    pairs = sum(e.n for e in known) * ffn.n_ff
    mass = math.fsum(e.mass for e in known)
    trained = float(routed[routed >= MIN_SAMPLES].sum()) / float(routed.sum())
    used = model.n_expert_used
    return replace(
        empty,
        recall=1 - trained * (1 - math.fsum(e.kept for e in known) / mass) if mass else 1.0,
        candidates=1 - trained * (1 - sum(e.named for e in known) / max(1, pairs)),
        active=sum(e.active for e in known) / max(1, pairs),
        predictor_bytes=used * known[0].n_bytes,
        expected_bytes=used * math.fsum(e.expected_bytes for e in known) / len(known),
        exact_bytes=used * math.fsum(e.exact_bytes for e in known) / len(known),
    )
