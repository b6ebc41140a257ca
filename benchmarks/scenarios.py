"""Draws the scenarios of `eplb stress` into docs/scenarios: python -m benchmarks.scenarios"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from flash_eplb.collectors.synthetic import SCENARIOS, Noise, Sizes, draw

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "scenarios"
SIZES = Sizes(layers=1, experts=16, seed=2)
RANKS, STEPS, EPISODE = 4, 3200, 16
TOKENS = 1024 * 8  # of a full step, times experts per token


def counts_of(name: str) -> np.ndarray:
    """int64 [episodes, experts] of the first steps, with the experts placed anew now and then."""
    at, noise = SCENARIOS[name][0](SIZES), Noise(1)
    counts, found, where = np.zeros((1, SIZES.experts), np.int64), [], 0
    random = np.random.default_rng(0)
    placement = np.arange(SIZES.experts).reshape(1, RANKS, -1)
    for step in range(STEPS):
        if hasattr(at, "placed") and step % 400 == 0:
            at.placed(step, placement)
            placement = random.permutation(SIZES.experts).reshape(placement.shape)
        demand = at(step)
        tokens = max(1, int(TOKENS * demand.scale))
        where = draw(demand.share, tokens, noise.uniform, noise.normal, where + 997, counts)
        found.append(counts[0].copy())
    return np.reshape(found, (STEPS // EPISODE, EPISODE, -1)).sum(1)


def plot(name: str) -> None:
    """Tokens of 16 experts over time, and the PAR of four ranks on which nothing moves."""
    counts = counts_of(name)
    load = counts.reshape(len(counts), RANKS, -1).sum(2)
    figure, (heat, par) = plt.subplots(1, 2, figsize=(7.2, 1.7), width_ratios=(3, 2))
    share = counts / counts.sum(1, keepdims=True)
    heat.imshow(
        share.T, aspect="auto", cmap="magma", vmin=0, extent=(0, STEPS, 16, 0), interpolation="none"
    )
    heat.set(xlabel="step", ylabel="expert", yticks=(0, 8, 16))
    heat.set_title("share of the tokens, one layer", fontsize=8, loc="left")
    par.plot(np.arange(len(load)) * EPISODE, load.max(1) / load.mean(1), color="#a3195b", lw=1)
    par.set(xlabel="step", ylim=(0.95, 3), xlim=(0, STEPS))
    par.set_title("PAR of 16 steps, nothing moved", fontsize=8, loc="left")
    par.grid(alpha=0.3)
    for axes in (heat, par):
        axes.tick_params(labelsize=7)
        axes.xaxis.label.set_size(7)
        axes.yaxis.label.set_size(7)
    figure.tight_layout(pad=0.4)
    figure.savefig(FOLDER / f"{name}.png", dpi=110)
    plt.close(figure)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in SCENARIOS:
        plot(name)


if __name__ == "__main__":
    main()
