"""Correlation of an expert's loss on its own interval with its contribution to FID.

    python benchmarks/interval_loss.py

The truth is the contribution of each of an expert's 27 candidates in benchmarks/digits_table to log FID, by the surrogate fitted
to all scored cascades of one training seed. It is compared with earlier signals by Kendall's tau, averaged over training seeds.
``loss`` is the held-out interval loss at the same length. ``loss, p alike`` is the same among candidates of one p, averaged over
the three p. ``half: loss`` and ``half: contribution`` are loss and contribution at half the training length, with the first
training seed only. The last line is one JSON object.
"""

import json

import numpy as np
from digits_table.make import CANDIDATES, HALF, PROBABILITIES, SEEDS
from scipy.stats import kendalltau
from search_efficiency import EXPERTS, Table

SIGNALS = ("loss", "loss, p alike", "half: loss", "half: contribution")


def tau(signal: np.ndarray, truth: np.ndarray) -> float:
    return float(kendalltau(signal, truth).statistic)


def alike(signal: np.ndarray, truth: np.ndarray) -> float:
    """Return tau among candidates of one p, averaged over p."""
    groups = [[place for place, candidate in enumerate(CANDIDATES) if candidate[2] == p] for p in PROBABILITIES]
    return float(np.mean([tau(signal[group], truth[group]) for group in groups]))


def main() -> None:
    tables, half = [Table(seed) for seed in SEEDS], Table(SEEDS[0], HALF)
    found: dict[str, dict[str, float]] = {signal: {} for signal in SIGNALS}
    for number in EXPERTS:
        place, name = number - 1, f"expert {number}"
        known = [(table.losses[place], table.parts[place]) for table in tables]
        found["loss"][name] = np.mean([tau(*pair) for pair in known])
        found["loss, p alike"][name] = np.mean([alike(*pair) for pair in known])
        found["half: loss"][name] = tau(half.losses[place], known[0][1])
        found["half: contribution"][name] = tau(half.parts[place], known[0][1])
    rounded = {signal: {name: round(float(value), 2) for name, value in row.items()} for signal, row in found.items()}
    for signal, row in rounded.items():
        print(f"{signal:<20}", "  ".join(f"{name} {value:5.2f}" for name, value in row.items()))
    print(json.dumps(rounded))


if __name__ == "__main__":
    main()
