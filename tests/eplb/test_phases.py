from types import SimpleNamespace

import numpy as np
import pytest

from flash_eplb.eplb.phases import phase_of, show_batches
from flash_eplb.ipc.flags import FLAG_DECODE, FLAG_PREFILL


def batch(*requests):
    """A batch of (computed, prompt) tokens, with what other requests left behind them."""
    computed, prompts = (np.array(column, int) for column in zip(*requests, (0, 9), strict=True))
    return SimpleNamespace(
        num_reqs=len(requests), num_computed_tokens_cpu=computed, num_prompt_tokens=prompts
    )


@pytest.mark.parametrize(
    ("requests", "phase"),
    [
        ([(0, 8)], FLAG_PREFILL),
        ([(7, 8), (0, 1)], FLAG_PREFILL),
        ([(8, 8), (20, 8)], FLAG_DECODE),
        ([(8, 8), (4, 8)], FLAG_PREFILL | FLAG_DECODE),
        ([], 0),
    ],
)
def test_a_request_is_in_prefill_until_its_prompt_is_computed(requests, phase):
    assert phase_of(batch(*requests)) == phase


@pytest.mark.parametrize(
    ("prefilling", "phase"),
    [
        ([True, True], FLAG_PREFILL),
        ([False], FLAG_DECODE),
        ([True, False], FLAG_PREFILL | FLAG_DECODE),
        ([], 0),
    ],
)
def test_a_batch_of_model_runner_v2_says_it_itself(prefilling, phase):
    found = SimpleNamespace(
        num_reqs=len(prefilling), is_prefilling_np=np.array([*prefilling, True, False])
    )
    assert phase_of(found) == phase


@pytest.mark.parametrize("unknown", [None, SimpleNamespace(num_reqs=1)])
def test_a_batch_of_an_unknown_kind_has_no_phase(unknown):
    assert phase_of(unknown) == 0


def test_the_state_sees_the_batch_of_its_runner_before_the_step():
    class Runner:
        def __init__(self):
            self.eplb_state = SimpleNamespace(batch=None)
            self.input_batch = batch((0, 8))

        def eplb_step(self, is_dummy=False):
            return self.eplb_state.batch, is_dummy

    show_batches(Runner)
    wrapped = Runner.eplb_step
    show_batches(Runner)  # a second state does not wrap again
    assert Runner.eplb_step is wrapped
    runner = Runner()
    assert runner.eplb_step(is_dummy=True) == (runner.input_batch, True)


def test_the_runner_of_a_model_without_eplb_steps_as_before():
    """vLLM calls `eplb_step` of every runner; a trainer may hold several in one process."""

    class Runner:
        eplb_state = None
        input_batch = batch((0, 8))

        def eplb_step(self):
            return "stepped"

    show_batches(Runner)
    assert Runner().eplb_step() == "stepped"


def test_a_runner_without_the_step_is_left_as_it_is():
    class Other:
        pass

    show_batches(Other)
    assert not hasattr(Other, "eplb_step")
