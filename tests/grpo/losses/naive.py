"""The losses once more, token by token in plain Python, from the formulas of the papers; nothing of torch."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

DEFAULT_BOUNDS = {
    "token_tis": (0.0, 2.0),
    "sequence_tis": (0.0, 2.0),
    "icepop": (0.5, 5.0),
    "sequence_mis": (0.0, 3.0),
    "sequence_mask": (0.5, 2.0),
    "geometric_mask": (0.999, 1.001),
}


@dataclass
class Naive:
    """Values, and derivatives derived by hand."""

    loss: float = 0.0
    policy: float = 0.0
    divergence: float = 0.0
    bonus: float = 0.0
    gradient: dict[tuple[int, int], float] = field(default_factory=dict)
    entropy_gradient: dict[tuple[int, int], float] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)


Rows = list[list[float]]


def naive_loss(
    new: Rows,
    behaviour: Rows,
    advantages: Rows,
    mask: list[list[bool]],
    *,
    proximal: Rows,
    reference: Rows,
    entropy: Rows,
    settings: dict[str, Any],
) -> Naive:
    """Compute the loss of `LossConfig(**settings)`; defaults are written out once more."""
    options = {
        "ratio": "token",
        "surrogate": "clip",
        "clip_low": 0.2,
        "clip_high": 0.28,
        "dual_clip": None,
        "aggregation": "token",
        "anchor": "behaviour",
        "correction": "none",
        "kl_coefficient": 0.0,
        "kl_estimator": "k3",
        "entropy_coefficient": 0.0,
    } | settings
    result = Naive()
    columns = [[c for c, flag in enumerate(row) if flag] for row in mask]
    rows = sum(bool(row) for row in columns)
    total = {
        "token": sum(len(row) for row in columns),
        "sequence": rows,
        "constant": rows * options.get("constant_tokens", 0),
    }[options["aggregation"]]
    for r, tokens in enumerate(columns):
        if not tokens:
            continue
        anchor = (proximal if options["anchor"] == "proximal" else behaviour)[r]
        ratios = {c: math.exp(_clamp(new[r][c] - anchor[c])) for c in tokens}
        if options["ratio"] == "sequence":
            mean = sum(_clamp(new[r][c] - anchor[c]) for c in tokens) / len(tokens)
            ratios = dict.fromkeys(tokens, math.exp(mean))
        weights = _weights(proximal[r], behaviour[r], tokens, options, result.counts)
        scale = (1.0 / len(tokens) if options["aggregation"] == "sequence" else 1.0) / total
        for c in tokens:
            value, slope = _surrogate(ratios[c], advantages[r][c], new[r][c], options, result.counts)
            if options["surrogate"] == "clip" and abs(new[r][c] - anchor[c]) > 20:
                slope = 0.0  # the documented clamp of the log-ratio
            distance, pull = 0.0, 0.0
            if options["kl_coefficient"]:
                distance, pull = _divergence(new[r][c] - reference[r][c], options["kl_estimator"])
            result.policy -= scale * weights[c] * value
            result.divergence += scale * options["kl_coefficient"] * distance
            result.bonus -= scale * options["entropy_coefficient"] * entropy[r][c]
            result.gradient[r, c] = scale * (-weights[c] * slope + options["kl_coefficient"] * pull)
            result.entropy_gradient[r, c] = -scale * options["entropy_coefficient"]
            drift = _clamp(new[r][c] - behaviour[r][c])
            result.counts["behaviour_kl"] += math.exp(drift) - 1 - drift
            result.counts["reference_kl"] += distance
            result.counts["ratio"] += ratios[c]
    result.loss = result.policy + result.divergence + result.bonus
    return result


def _clamp(value: float) -> float:
    return min(max(value, -20.0), 20.0)


def _surrogate(
    ratio: float, advantage: float, log_prob: float, options: dict[str, Any], counts: Counter[str]
) -> tuple[float, float]:
    low, high = 1 - options["clip_low"], 1 + options["clip_high"]
    clipped = min(max(ratio, low), high)
    if options["surrogate"] == "cispo":
        counts["clipped_low"] += ratio < low
        counts["clipped_high"] += ratio > high
        return clipped * advantage * log_prob, clipped * advantage
    if options["dual_clip"] and advantage < 0 and ratio > options["dual_clip"]:
        counts["dual_clipped"] += 1
        return options["dual_clip"] * advantage, 0.0
    if clipped * advantage < ratio * advantage:
        counts["clipped_low" if advantage < 0 else "clipped_high"] += 1
        return clipped * advantage, 0.0
    return ratio * advantage, ratio * advantage


def _divergence(difference: float, estimator: str) -> tuple[float, float]:
    difference, inside = _clamp(difference), abs(difference) < 20
    if estimator == "k1":
        return difference, float(inside)
    if estimator == "k2":
        return difference**2 / 2, difference * inside
    value = math.exp(-difference) - 1 + difference
    return (10.0, 0.0) if value > 10 else (value, (1 - math.exp(-difference)) * inside)


def _weights(
    proximal: list[float],
    behaviour: list[float],
    tokens: list[int],
    options: dict[str, Any],
    counts: Counter[str],
) -> dict[int, float]:
    name = options["correction"]
    if name == "none":
        counts["correction_weight"] += len(tokens)
        return dict.fromkeys(tokens, 1.0)
    low, high = DEFAULT_BOUNDS[name]
    low = low if options.get("correction_low") is None else options["correction_low"]
    high = high if options.get("correction_high") is None else options["correction_high"]
    differences = {c: _clamp(proximal[c] - behaviour[c]) for c in tokens}
    if name in ("token_tis", "icepop"):
        ratios = {c: math.exp(value) for c, value in differences.items()}
    elif name == "geometric_mask":
        ratios = dict.fromkeys(tokens, math.exp(sum(differences.values()) / len(tokens)))
    else:
        ratios = dict.fromkeys(tokens, math.exp(_clamp(sum(differences.values()))))
    weights = {}
    for c, ratio in ratios.items():
        kept = low <= ratio <= high
        if name in ("token_tis", "sequence_tis"):
            weights[c] = min(max(ratio, low), high)
            counts["truncated_tokens"] += not kept
        else:
            weights[c] = 0.0 if not kept else ratio if name in ("icepop", "sequence_mis") else 1.0
            counts["masked_tokens"] += not kept
    counts["masked_rows"] += name not in ("token_tis", "sequence_tis") and not any(weights.values())
    counts["correction_weight"] += sum(weights.values())
    return weights
