"""Synthetic heat families as counts per step, and the recordings that a benchmark can read."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

STEP_TOKENS = 8192 * 8  # a full step of 8,192 tokens, top-8; the decode family has its own
EPISODE_STEPS = 16
WINDOW_EPISODES = 64
WINDOWS = 7  # six plans, each scored on the window after it
WINDOW_STEPS = EPISODE_STEPS * WINDOW_EPISODES

Family = Callable[[int, int, int, int], np.ndarray]


def families() -> dict[str, Family]:
    """The families by name; each takes (experts, layers, steps, seed).

    The result is uint16[steps, layers, experts], the tokens of each expert in each step.
    """
    return {
        "zipf-0.4": partial(_zipf_heat, 0.4),
        "zipf-0.8": partial(_zipf_heat, 0.8),
        "zipf-1.2": partial(_zipf_heat, 1.2),
        "zipf-1.5": partial(_zipf_heat, 1.5),
        "drift": _drift,
        "antiphase": _antiphase,
        "burst": _burst,
        "near-balanced": _near_balanced,
        "decode": _decode,
    }


def episodes(steps_heat: np.ndarray, steps_per_episode: int = EPISODE_STEPS) -> np.ndarray:
    """Sums of consecutive steps, int64[episodes, layers, experts]; a rest at the end is dropped."""
    count = len(steps_heat) // steps_per_episode
    cut = steps_heat[: count * steps_per_episode]
    shape = (count, steps_per_episode, *steps_heat.shape[1:])
    return cut.reshape(shape).sum(axis=1, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Case:
    """Heat of one model, and how it is cut into windows.

    Attributes:
        name: the family or the recording.
        steps: counts [steps, layers, experts].
        episode_steps: steps per episode.
        window: steps of the training window; the next window is as long and follows it.
        rolling: steps per window when plans follow one another; 0 where there is too little.
    """

    name: str
    steps: np.ndarray
    episode_steps: int = EPISODE_STEPS
    window: int = WINDOW_STEPS
    rolling: int = WINDOW_STEPS

    @property
    def experts(self) -> int:
        """Experts per layer."""
        return self.steps.shape[2]

    def train(self) -> np.ndarray:
        """Steps of the window that is planned on."""
        return self.steps[: self.window]

    def next(self) -> np.ndarray:
        """Steps of the window after it."""
        return self.steps[self.window : 2 * self.window]

    def windows(self) -> list[np.ndarray]:
        """Steps of each rolling window; none where the heat is too short."""
        if not self.rolling:
            return []
        return [self.steps[i * self.rolling : (i + 1) * self.rolling] for i in range(WINDOWS)]


def synthetic(name: str, experts: int, layers: int, seed: int) -> Case:
    """One family at one shape, as many windows as the rolling part needs."""
    return Case(name, families()[name](experts, layers, WINDOWS * WINDOW_STEPS, seed))


def stationary(exponent: float, experts: int, layers: int, windows: int, seed: int) -> np.ndarray:
    """Zipf heat that never changes, int64[windows, episodes, layers, experts]."""
    rng = _rng(f"stationary-{exponent}", experts, layers, seed)
    share = _permuted(rng, _zipf(experts, exponent), layers)
    tokens = share * STEP_TOKENS * EPISODE_STEPS
    return rng.poisson(tokens, (windows, WINDOW_EPISODES, layers, experts))


def traces_folder() -> Path:
    """Where recordings are looked for; EPLB_TRACES overrides it."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "traces"
    return Path(os.environ.get("EPLB_TRACES", beside))


def traces(folder: Path | None = None) -> list[Case]:
    """The recordings in `folder`.

    Raises:
        FileNotFoundError: names the file that is not there.
    """
    folder = traces_folder() if folder is None else folder
    with np.load(folder / "deepseek_v2_lite_steps.npz") as file:
        decode, prefill = file["decode_b64"], file["prefill_chunk2048"]
    half = len(prefill) // 2
    # decode: two windows of 32 episodes; rolling: 7 of 9 episodes, all that 1,024 steps allow
    cases = [
        Case("trace-decode", decode, EPISODE_STEPS, 32 * EPISODE_STEPS, 9 * EPISODE_STEPS),
        Case("trace-prefill", prefill, 1, half, len(prefill) // WINDOWS),
    ]
    with np.load(folder / "deepseek_v3_phase_totals.npz") as file:
        totals = {name: file[name] for name in file.files}
    routed = totals["prefill_in512"].sum(axis=1) > 0  # the first layers are dense
    for name, train, score in (
        ("trace-v3-prefill", "prefill_in512", "prefill_in4096"),
        ("trace-v3-decode", "decode_in1000out1000", "decode_in2000out100"),
    ):
        pair = np.stack([totals[train][routed], totals[score][routed]])
        cases.append(Case(name, pair, 1, 1, 0))
    return cases


def _rng(name: str, experts: int, layers: int, seed: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(name.encode()), experts, layers, seed])


def _zipf(experts: int, exponent: float) -> np.ndarray:
    weights = np.arange(1, experts + 1, dtype=np.float64) ** -exponent
    return weights / weights.sum()


def _permuted(rng: np.random.Generator, share: np.ndarray, layers: int) -> np.ndarray:
    """`share` [experts] in an order of its own for each layer, [layers, experts]."""
    return rng.permuted(np.tile(share, (layers, 1)), axis=1)


def _wander(rng: np.random.Generator, knots: int, memory: float, shape: tuple) -> np.ndarray:
    """A stationary walk [knots, *shape] of unit variance that forgets over `memory` knots."""
    keep = np.exp(-1.0 / memory)
    noise = rng.standard_normal((knots, *shape))
    walk = np.empty_like(noise)
    walk[0] = noise[0]
    for k in range(1, knots):
        walk[k] = keep * walk[k - 1] + np.sqrt(1 - keep**2) * noise[k]
    return walk


def _between(knots: np.ndarray, steps: int, spacing: int) -> np.ndarray:
    """`knots` [count, ...] at every `spacing` steps, interpolated to [steps, ...]."""
    at = np.arange(steps) / spacing
    left = at.astype(np.int64)
    part = (at - left).reshape(-1, *([1] * (knots.ndim - 1)))
    return (1 - part) * knots[left] + part * knots[left + 1]


def _counts(rng: np.random.Generator, share: np.ndarray, shape: tuple) -> np.ndarray:
    """Poisson counts of `share`, which is normalised over its last axis and broadcast."""
    share = share / share.sum(axis=-1, keepdims=True)
    counts = rng.poisson(share * STEP_TOKENS, shape)
    return np.minimum(counts, np.iinfo(np.uint16).max).astype(np.uint16)


def _zipf_heat(exponent: float, experts: int, layers: int, steps: int, seed: int) -> np.ndarray:
    rng = _rng(f"zipf-{exponent}", experts, layers, seed)
    share = _permuted(rng, _zipf(experts, exponent), layers)
    return _counts(rng, share, (steps, layers, experts))


def _drift(experts: int, layers: int, steps: int, seed: int) -> np.ndarray:
    """Eight topics; their mixture changes within a window and, more slowly, between windows."""
    rng = _rng("drift", experts, layers, seed)
    topics, spacing = 8, 32
    shares = _permuted(rng, _zipf(experts, 1.0), topics * layers)
    shares = shares.reshape(topics, layers, experts)
    knots = steps // spacing + 2
    slow = _wander(rng, knots, 8 * WINDOW_STEPS / spacing, (topics,))
    quick = _wander(rng, knots, WINDOW_STEPS / 12 / spacing, (topics,))
    weights = np.exp(_between(0.5 * slow + 0.7 * quick, steps, spacing))
    weights /= weights.sum(axis=1, keepdims=True)
    return _counts(rng, np.einsum("tk,kle->tle", weights, shares), (steps, layers, experts))


def _antiphase(experts: int, layers: int, steps: int, seed: int) -> np.ndarray:
    """Pairs of equally hot experts; one rises as the other falls, some 20 episodes a period."""
    rng = _rng("antiphase", experts, layers, seed)
    pairs = max(1, experts // 16)
    base = _zipf(experts, 0.5)
    base[: 2 * pairs] = np.repeat(base[: 2 * pairs].reshape(-1, 2).mean(axis=1), 2)
    period = EPISODE_STEPS * rng.uniform(17, 23, (layers, pairs))
    phase = rng.uniform(0, 2 * np.pi, (layers, pairs))
    swing = np.sin(2 * np.pi * np.arange(steps)[:, None, None] / period + phase)
    share = np.tile(base, (steps, layers, 1))
    share[..., 0 : 2 * pairs : 2] *= 1 + 0.8 * swing
    share[..., 1 : 2 * pairs : 2] *= 1 - 0.8 * swing
    order = rng.permuted(np.tile(np.arange(experts), (layers, 1)), axis=1)
    share = np.take_along_axis(share, order[None], axis=2)
    return _counts(rng, share, (steps, layers, experts))


def _burst(experts: int, layers: int, steps: int, seed: int) -> np.ndarray:
    """Mild skew; now and then an expert gets eight times its tokens for two to six episodes."""
    rng = _rng("burst", experts, layers, seed)
    share = _permuted(rng, _zipf(experts, 0.4), layers)
    count = -(-steps // EPISODE_STEPS)
    starts = rng.random((count, layers, experts)) < 0.003
    length = rng.integers(2, 7, starts.shape)
    left = np.zeros((layers, experts), np.int64)
    factor = np.ones(starts.shape)
    for episode in range(count):
        left = np.maximum(left - 1, np.where(starts[episode], length[episode], 0))
        factor[episode][left > 0] = 8.0
    hot = np.repeat(share * factor, EPISODE_STEPS, axis=0)[:steps]
    return _counts(rng, hot, (steps, layers, experts))


def _near_balanced(experts: int, layers: int, steps: int, seed: int) -> np.ndarray:
    rng = _rng("near-balanced", experts, layers, seed)
    share = np.maximum(1 + 0.03 * rng.standard_normal((layers, experts)), 0.5)
    return _counts(rng, share, (steps, layers, experts))


def _decode(experts: int, layers: int, steps: int, seed: int) -> np.ndarray:
    """64 tokens a step, each to 8 different experts; popularity drifts over several windows."""
    rng = _rng("decode", experts, layers, seed)
    tokens, top, spacing = 64, min(8, max(1, experts // 2)), 64
    popular = np.log(_permuted(rng, _zipf(experts, 0.6), layers))
    knots = -(-steps // spacing)
    walk = _wander(rng, knots, 6 * WINDOW_STEPS / spacing, (layers, experts))
    heat = np.empty((steps, layers, experts), np.uint16)
    for k in range(knots):
        chunk = heat[k * spacing : (k + 1) * spacing]
        for layer in range(layers):
            share = _inclusion(np.exp(popular[layer] + 0.3 * walk[k, layer]), top)
            chunk[:, layer] = _without_replacement(rng, share, len(chunk), tokens, top)
    return heat


def _inclusion(weights: np.ndarray, top: int) -> np.ndarray:
    """Probabilities that sum to `top`, in proportion to `weights` but none above 1."""
    share = top * weights / weights.sum()
    while share.max() > 1 + 1e-9:
        full = share >= 1
        share = np.where(full, 1.0, share * (top - full.sum()) / share[~full].sum())
    return share


def _without_replacement(rng, share, steps: int, tokens: int, top: int) -> np.ndarray:
    """Counts [steps, experts] of systematic samples: `top` different experts for each token."""
    edges = np.cumsum(share)
    edges *= top / edges[-1]
    marks = rng.random((steps, tokens, 1)) + np.arange(top)
    chosen = np.minimum(np.searchsorted(edges, marks, side="right"), len(share) - 1)
    flat = chosen.reshape(steps, -1) + len(share) * np.arange(steps)[:, None]
    return np.bincount(flat.ravel(), minlength=steps * len(share)).reshape(steps, -1)
