"""What a plan must be, in code of its own: imports nothing of the planner."""

import numpy as np


def assert_valid(placement, experts):
    """Every expert has a slot in every layer, and none has two on a rank."""
    for layer in np.asarray(placement).tolist():
        assert {expert for rank in layer for expert in rank} == set(range(experts))
        for rank in layer:
            assert len(set(rank)) == len(rank)


def shares(placement, columns=None):
    """Share of its expert's tokens that each slot gets, float64[layers, ranks, slots]."""
    columns = np.ones(placement.shape) if columns is None else columns.astype(np.float64)
    share = np.empty(placement.shape)
    for layer in range(len(placement)):
        totals = np.bincount(placement[layer].ravel(), columns[layer].ravel())
        share[layer] = columns[layer] / totals[placement[layer]]
    return share


def episode_ratios(heat, placement, columns=None):
    """Highest load of a rank over the mean load, float64[episodes, layers]; 1 if there is none."""
    ratios = np.ones(heat.shape[:2])
    share = shares(placement, columns)
    for t, layer in np.ndindex(*ratios.shape):
        tokens = heat[t, layer].astype(np.float64)
        if tokens.any():
            tokens /= tokens.max()  # sums of huge counts overflow
            loads = (tokens[placement[layer]] * share[layer]).sum(axis=1)
            ratios[t, layer] = loads.max() / loads.mean()
    return ratios


def ratios(heat, placement, columns=None):
    """PAR of each layer, float64[layers]."""
    return episode_ratios(heat, placement, columns).mean(axis=0)


def gains_per_move(plan):
    """What each picked layer wins per slot it moves, in the order of the plan."""
    writes = (plan.before != plan.placement).sum(axis=(1, 2))
    return ((plan.par_before - plan.par_after) / np.maximum(writes, 1))[plan.layers]


def carried_out(placement, moves):
    """The placement after moves that all take effect at once, their sources before any of them."""
    moved = placement.copy()
    written = set()
    for layer, expert, source_rank, source_slot, rank, slot in moves.tolist():
        assert placement[layer, source_rank, source_slot] == expert
        assert expert not in placement[layer, rank]
        assert (layer, rank, slot) not in written
        written.add((layer, rank, slot))
        moved[layer, rank, slot] = expert
    return moved


def assert_leads(plan, today, experts):
    """The plan leads from `today` to a valid placement and changes what it says it does."""
    assert (plan.before == today).all()
    assert plan.placement.dtype == np.int32
    assert_valid(plan.placement, experts)
    changed = (plan.placement != today).any(axis=(1, 2))
    assert len(set(plan.layers.tolist())) == len(plan.layers)
    assert sorted(plan.layers.tolist()) == np.flatnonzero(changed).tolist()
    assert bool(plan) == bool(changed.any() or len(plan.rerouted))
    for layer, rank, slot in np.ndindex(*today.shape):
        if today[layer, rank, slot] in plan.placement[layer, rank]:
            assert plan.placement[layer, rank, slot] == today[layer, rank, slot]
    assert (carried_out(today, plan.moves) == plan.placement).all()
    assert len(plan.moves) == (plan.placement != today).sum()


def assert_rounds(plan, rows, experts):
    """Rounds that write at most `rows` slots of a rank lead through valid placements."""
    placement = plan.before
    for step in plan.rounds(rows):
        most = np.bincount(step.moves["rank"], minlength=1).max()
        assert most <= rows
        assert most or len(step.rerouted)
        placement = carried_out(placement, step.moves)
        assert (step.placement == placement).all()
        assert_valid(placement, experts)
    assert (placement == plan.placement).all()


def assert_columns(plan, heat, most):
    """Planned routing columns are within their bounds and no worse than uniform ones."""
    assert plan.columns.dtype == np.int16
    assert plan.columns.shape == plan.placement.shape
    assert plan.columns.min(initial=1) >= 1
    for layer, columns in zip(plan.placement, plan.columns, strict=True):
        assert np.bincount(layer.ravel(), columns.ravel()).max() <= most
    uniform, planned = ratios(heat, plan.placement), ratios(heat, plan.placement, plan.columns)
    assert (planned[plan.changed] <= uniform[plan.changed] * (1 + 1e-6)).all()


def assert_measured(plan, heat, columns=None, wins=True):
    """The PARs of the plan are those of the heat, and no layer is worse off if it `wins`.

    `columns` are those of the plan before, if the placement is still its.
    """
    np.testing.assert_allclose(plan.par_before, ratios(heat, plan.before, columns), rtol=1e-5)
    after = ratios(heat, plan.placement, plan.columns)
    np.testing.assert_allclose(plan.par_after, after, rtol=1e-5)
    if wins:
        assert (plan.par_after <= plan.par_before * (1 + 1e-6)).all()
        assert (plan.par_after < plan.par_before)[plan.layers].all()


def assert_same(one, other):
    """Two plans are equal in everything."""
    for name in ("before", "placement", "layers", "columns", "par_before", "par_after", "moves"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
