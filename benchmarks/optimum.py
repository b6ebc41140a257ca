"""Small instances solved to proven optimality by CP-SAT, and `thorough` measured against them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from ortools.sat.python import cp_model

from . import scoring
from .policies import flash_lb
from .targets import Target, at_least, at_most, not_run

SEED_HEAT = (600, 560, 120, 120, 20, 10, 10, 10)
SEED_RANKS, SEED_SLOTS = 8, 2
TIME_LIMIT = 60.0  # seconds per instance; one that takes longer is counted as not proven
WORKERS = 8  # CP-SAT's search strategies, not threads of a policy


@dataclass(frozen=True, eq=False)
class Instance:
    """Heat int64[episodes, experts] and the places for its experts."""

    heat: np.ndarray
    ranks: int
    slots: int


@dataclass(frozen=True)
class Result:
    """PAR of an instance: the proven optimum, or nan, and that of `thorough`."""

    optimum: float
    thorough: float

    @property
    def gap(self) -> float:
        """How far above the optimum, as a share of it."""
        return self.thorough / self.optimum - 1


def instance(seed: int) -> Instance:
    """A random instance: at most 12 experts on 4 ranks in 16 slots, 1 to 6 episodes."""
    rng = np.random.default_rng([3, seed])
    while True:
        ranks, experts = int(rng.integers(2, 5)), int(rng.integers(4, 13))
        slots = min(experts, -(-experts // ranks) + int(rng.integers(0, 3)))
        if ranks * slots <= 16:
            break
    weight = np.arange(1, experts + 1) ** -rng.uniform(0.2, 1.5)
    rng.shuffle(weight)
    swing = np.exp(0.4 * rng.standard_normal((int(rng.integers(1, 7)), experts)))
    heat = 1 + rng.poisson(200 * experts * weight / weight.sum() * swing)
    return Instance(heat, ranks, slots)


def solve(problem: Instance, limit: float = TIME_LIMIT) -> float:
    """The least PAR with tokens split evenly among replicas; nan if not proven in time.

    All coefficients are whole numbers: loads are multiplied by the least common multiple of the
    possible replica counts. A mixed-integer solver in floating point (HiGHS 1.12) was tried and
    called a placement optimal that was 0.03% above the optimum.
    """
    model = cp_model.CpModel()
    heat = problem.heat[:, np.argsort(-problem.heat.sum(axis=0), kind="stable")]
    episodes, experts = heat.shape
    most = min(problem.ranks, problem.ranks * problem.slots - experts + 1)
    unit = math.lcm(*range(1, most + 1))
    on = _placement_variables(model, experts, problem, most)
    peaks = []
    for tokens in heat.tolist():
        total = sum(tokens) * unit
        peak = model.new_int_var(-(-total // problem.ranks), total, "")
        for rank in range(problem.ranks):
            parts = [
                tokens[e] * unit // (r + 1) * on[e][rank][r]
                for e in range(experts)
                for r in range(most)
            ]
            model.add(peak >= sum(parts))
        peaks.append((peak, total))
    scale = 10**12 // episodes
    model.minimize(sum(scale * problem.ranks // total * peak for peak, total in peaks))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = WORKERS
    solver.parameters.max_time_in_seconds = limit
    if solver.solve(model) != cp_model.OPTIMAL:
        return math.nan
    return float(np.mean([solver.value(p) * problem.ranks / total for p, total in peaks]))


def compare(problem: Instance) -> Result:
    """The optimum and our `thorough` from vLLM's first placement."""
    heat = problem.heat[:, None]
    start = scoring.initial(1, problem.ranks, problem.slots, heat.shape[2])
    policy = flash_lb(problem.ranks, problem.slots, "thorough")
    planned = policy.plan(heat, start, every_layer=True).placement
    wrong = scoring.faults(planned, start.shape, heat.shape[2])
    if wrong:
        raise ValueError(f"the plan of thorough has {wrong}")
    return Result(solve(problem), scoring.par(heat, planned))


def optimum_targets(results: list[Result]) -> list[Target]:
    """The rows for the instances."""
    proven = [result for result in results if not math.isnan(result.optimum)]
    gaps = [100 * result.gap for result in proven]
    name = f"thorough, gap to the optimum of {len(gaps)} instances, PAR, %"
    return [
        at_least("instances solved to proven optimality, share", len(gaps) / len(results), 1.0),
        at_most(f"{name}, mean", float(np.mean(gaps)), 0.5),
        at_most(f"{name}, worst", max(gaps), 2.0),
    ]


def seed_targets() -> list[Target]:
    """The seed example: its peak with uniform routing and with routing weights."""
    heat = np.array(SEED_HEAT)[None, None]
    start = scoring.initial(1, SEED_RANKS, SEED_SLOTS, len(SEED_HEAT))
    rows = []
    for routing, limit in (("uniform", 196.67), ("weighted", 181.5)):
        name = f"seed example, peak, {routing} routing"
        options = {} if routing == "uniform" else {"routing": routing}
        try:
            policy = flash_lb(SEED_RANKS, SEED_SLOTS, "thorough", **options)
            plan = policy.plan(heat, start, every_layer=True)
            columns = np.ones_like(start) if routing == "uniform" else plan.columns
            rows.append(at_most(name, round(_peak(plan.placement[0], columns[0]), 2), limit))
        except (AttributeError, TypeError) as error:
            rows.append(not_run(name, f"<= {limit}", str(error)))
    return rows


def _peak(rows: np.ndarray, columns: np.ndarray) -> float:
    """Tokens of the busiest rank when slots share an expert's tokens by their columns."""
    total = np.bincount(rows.ravel(), weights=columns.ravel(), minlength=len(SEED_HEAT))
    return float((np.array(SEED_HEAT)[rows] * columns / total[rows]).sum(axis=1).max())


def _placement_variables(model, experts: int, problem: Instance, most: int) -> list:
    """on[expert][rank][r]: the expert has r + 1 replicas, and one of them is on the rank."""
    ranks, slots = problem.ranks, problem.slots
    on = [
        [[model.new_bool_var("") for _ in range(most)] for _ in range(ranks)]
        for _ in range(experts)
    ]
    count = [[model.new_bool_var("") for _ in range(most)] for _ in range(experts)]
    for e in range(experts):
        model.add_exactly_one(count[e])
        for r in range(most):
            model.add(sum(on[e][d][r] for d in range(ranks)) == (r + 1) * count[e][r])
            for d in range(ranks):
                model.add_implication(on[e][d][r], count[e][r])
    for d in range(ranks):
        model.add(sum(on[e][d][r] for e in range(experts) for r in range(most)) == slots)
    # ranks are alike: order them by the hottest expert that tells them apart
    keys = [
        sum((1 << (experts - 1 - e)) * sum(on[e][d]) for e in range(experts)) for d in range(ranks)
    ]
    for d in range(ranks - 1):
        model.add(keys[d] >= keys[d + 1])
    return on
