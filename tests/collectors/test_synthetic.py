import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_eplb.collectors.synthetic import (
    ANTIPHASE_STEPS,
    BURST_EVERY,
    BURST_STEPS,
    DRIFT_STEPS,
    PHASE_STEPS,
    SCENARIOS,
    Noise,
    Sizes,
    draw,
    parts,
    spread,
    warmup,
    zipf_share,
)
from flash_eplb.ipc.flags import FLAG_DECODE, FLAG_PREFILL

SIZES = Sizes(layers=3, experts=16, seed=4)
NOISE = Noise(1)


def scenario(name, sizes=SIZES):
    return SCENARIOS[name][0](sizes)


def drawn(share, tokens, first=0):
    counts = np.zeros(share.shape, np.int64)
    draw(share, tokens, NOISE.uniform, NOISE.normal, first, counts)
    return counts


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("step", [0, 1, 77, 401, 650, 100_000])
def test_shares_are_shares(name, step):
    share = scenario(name)(step).share
    assert share.shape == (3, 16)
    assert (share >= 0).all()
    assert np.allclose(share.sum(1), 1)


@pytest.mark.parametrize("name", SCENARIOS)
def test_processes_agree_by_seed_and_step_alone(name):
    ours, theirs, other = scenario(name), scenario(name), scenario(name, Sizes(3, 16, 5))
    for step in (3, 900):
        ours(step - 1)
        assert np.array_equal(ours(step).share, theirs(step).share)
    assert name == "balanced" or not np.array_equal(ours(900).share, other(900).share)


def test_layers_have_hot_experts_of_their_own():
    assert len(set(zipf_share(Sizes(16, 64), 1.0).argmax(1).tolist())) > 8


@pytest.mark.parametrize("name", ["zipf", "decode", "balanced"])
def test_some_scenarios_do_not_change(name):
    at = scenario(name)
    assert np.array_equal(at(0).share, at(12_345).share)


def test_drift_changes_slowly_and_altogether():
    at = scenario("drift")
    near, far = (np.abs(at(0).share - at(step).share).sum(1).max() for step in (10, DRIFT_STEPS))
    assert near < 0.01
    assert far > 0.5


def test_in_antiphase_half_of_the_experts_rest():
    at = scenario("antiphase")
    up, down = (at(ANTIPHASE_STEPS * quarter // 4).share for quarter in (1, 3))
    rises = up > down
    assert rises.sum(1).tolist() == [8, 8, 8]
    assert (up[rises] / down[rises]).min() > 4


def test_a_burst_comes_and_goes():
    at = scenario("burst")
    calm, hot = at(5).share, at(BURST_EVERY + 5).share
    assert ((hot - calm).max(1) > 0.07).all()
    assert np.array_equal(at(BURST_EVERY + BURST_STEPS).share, calm)
    assert np.array_equal(at(5 + BURST_STEPS).share, calm)


def test_phases_take_turns():
    at = scenario("phase-switch")
    phases = [at(PHASE_STEPS * n + 7) for n in range(3)]
    assert [phase.flags for phase in phases] == [FLAG_PREFILL, FLAG_DECODE, FLAG_PREFILL]
    assert phases[1].scale < phases[0].scale
    assert not np.array_equal(phases[0].share, phases[1].share)
    assert phases[0] is phases[2]


def test_the_adversary_loads_the_busiest_rank():
    adversary = scenario("adversarial", Sizes(2, 8))
    placement = np.tile(np.arange(8), (2, 1)).reshape(2, 4, 2)
    for epoch in range(4):
        before = np.take_along_axis(adversary(0).share, placement.reshape(2, 8), 1)
        busiest = before.reshape(2, 4, 2).sum(2).argmax(1)
        adversary.placed(epoch, placement)
        share = adversary(0).share
        assert np.allclose(share.sum(1), 1)
        for layer in range(2):
            hottest = set(np.argsort(-share[layer])[:2].tolist())
            assert hottest == set(placement[layer, busiest[layer]].tolist())
        placement = np.roll(placement.reshape(2, 8), 1, axis=1).reshape(2, 4, 2)


def test_the_adversary_waits_for_the_next_placement():
    adversary = scenario("adversarial", Sizes(1, 8))
    placement = np.arange(8).reshape(1, 4, 2)
    adversary.placed(0, placement)
    before = adversary(0).share.copy()
    adversary.placed(0, np.roll(placement.ravel(), 3).reshape(1, 4, 2))
    assert np.array_equal(adversary(9).share, before)


@given(
    tokens=st.integers(0, 5000),
    exponent=st.floats(0, 3),
    experts=st.integers(2, 200),
    first=st.integers(0, 10**6),
)
def test_a_layer_has_the_tokens_of_the_step(tokens, exponent, experts, first):
    counts = drawn(zipf_share(Sizes(2, experts), exponent), tokens, first)
    assert (counts >= 0).all()
    assert counts.sum(1).tolist() == [tokens, tokens]


def test_an_expert_that_nobody_likes_gets_nothing():
    share = np.array([[0.5, 0.5, 0.0]])
    assert all(drawn(share, 101, first)[0, 2] == 0 for first in range(50))


@pytest.mark.parametrize("tokens", [20, 4000])
def test_counts_are_as_noisy_as_a_router(tokens):
    share = zipf_share(Sizes(1, 40), 0.6)
    counts = np.concatenate([drawn(share, tokens, 977 * n) for n in range(4000)])
    mean = share[0] * tokens
    assert np.abs(counts.mean(0) / mean - 1).max() < 0.12
    assert 0.8 < (counts.var(0) / mean).mean() < 1.3


def random_parts(seed, layers=3, ranks=4, slots=6, experts=16):
    random = np.random.default_rng(seed)
    extra = random.integers(experts, size=(layers, ranks * slots - experts))
    held = np.concatenate([np.tile(np.arange(experts), (layers, 1)), extra], axis=1)
    placement = random.permuted(held, axis=1).reshape(layers, ranks, slots)
    columns = random.integers(1, 6, placement.shape).astype(np.int16)
    return placement, columns, parts(placement, columns, experts)


@given(seed=st.integers(0, 1000), tokens=st.integers(0, 3000))
def test_slots_of_an_expert_share_its_tokens(seed, tokens):
    placement, _, divided = random_parts(seed)
    counts = drawn(zipf_share(SIZES, 1.0), tokens, seed)
    out = np.zeros((3, 24), np.int32)
    spread(counts, *divided, NOISE.uniform, seed, out)
    assert (out >= 0).all()
    for layer in range(3):
        sums = np.bincount(placement[layer].ravel(), out[layer], minlength=16)
        assert sums.tolist() == counts[layer].tolist()


def test_routing_columns_are_shares():
    placement, columns, divided = random_parts(7)
    total = np.zeros((3, 24))
    counts, out = np.full((3, 16), 10), np.zeros((3, 24), np.int32)
    for step in range(4000):
        spread(counts, *divided, NOISE.uniform, step * 11, out)
        total += out
    for layer in range(3):
        held, wide = placement[layer].ravel(), columns[layer].ravel()
        expected = 40_000.0 * wide / np.bincount(held, wide, minlength=16)[held]
        assert np.abs(total[layer] / expected - 1).max() < 0.03


def test_warming_up_compiles():
    warmup()
    assert draw.signatures
    assert spread.signatures
