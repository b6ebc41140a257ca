"""Model runner V2 as vLLM builds it: its own decorator and controller around a runner of ours."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flash_eplb.eplb import balanced
from flash_eplb.eplb.group import UnsupportedError
from flash_eplb.eplb.runners import follow_runner_v2, follow_warm_up
from flash_eplb.ipc.flags import FLAG_DECODE, FLAG_PREFILL


@pytest.fixture(scope="module")
def vllm():
    """The parts of the installed vLLM, and our state."""
    level = logging.root.level
    from vllm.v1.worker.gpu.eplb_utils import EPLBController, step_eplb_after

    from flash_eplb.eplb import vllm_state

    logging.root.setLevel(level)
    return SimpleNamespace(
        controller=EPLBController, step_eplb_after=step_eplb_after, state=vllm_state
    )


class Worker:
    """In the place of `eplb.worker.Worker`: a log of what it was told."""

    def __init__(self):
        self.calls = []

    def settle(self):
        self.calls.append("settle")

    def forward(self, tokens):
        self.calls.append(("forward", tokens))

    def step(self, is_dummy, phase):
        self.calls.append(("step", is_dummy, phase))

    def told(self):
        told, self.calls = self.calls, []
        return told


def model_config(name):
    return SimpleNamespace(compute_hash=lambda: name)


def batch(*prefilling):
    return SimpleNamespace(num_reqs=len(prefilling), is_prefilling_np=np.array([*prefilling, True]))


@pytest.fixture
def runner(vllm):
    class GPUModelRunner:
        def __init__(self):
            parallel = SimpleNamespace(
                enable_eplb=True, eplb_config=SimpleNamespace(log_balancedness=False)
            )
            self.eplb = vllm.controller(parallel, None)
            self.execute_model_state = None
            self.model_config = model_config("main")
            self.draft_config = model_config("draft")

        @property
        def eplb_state(self):
            return self.eplb.state

        def execute_model(self, batch, tokens):
            self.eplb.prepare_forward(self.model_config, tokens)
            self.execute_model_state = SimpleNamespace(input_batch=batch)

        @vllm.step_eplb_after()
        def sample_tokens(self, grammar_output):
            self.execute_model_state = None
            self.eplb.prepare_forward(self.draft_config, 7)  # of a drafter, in vLLM's own way
            return "sampled"

        @vllm.step_eplb_after()
        def pool(self):
            self.execute_model_state = None
            return "pooled"

        @vllm.step_eplb_after(is_dummy=True)
        def _dummy_run(self, tokens, skip_eplb=False, is_profile=False):
            self.execute_model(batch(), tokens)
            self.execute_model_state = None
            return "dummy"

    follow_runner_v2(GPUModelRunner, vllm.state._settle)
    follow_runner_v2(GPUModelRunner, vllm.state._settle)  # a second state wraps nothing twice
    made = GPUModelRunner()
    state = object.__new__(vllm.state.FlashEplbState)
    counted = [SimpleNamespace(num_unpadded_tokens_tensors=[torch.zeros(())]) for _ in range(2)]
    state.model_states = dict(zip(("draft", "main"), counted, strict=True))
    state.should_record_tensor = None
    state._configs = (made.draft_config, made.model_config)
    state.worker = Worker()
    made.eplb.state = state
    made.eplb._has_registered_models = True
    return made


def test_a_real_pass_is_counted_once_and_stepped_once_with_its_phase(runner):
    runner.execute_model(batch(True, False), 12)
    assert runner.sample_tokens(None) == "sampled"
    both = FLAG_PREFILL | FLAG_DECODE
    assert runner.eplb.state.worker.told() == [("forward", 12), ("step", False, both)]
    runner.execute_model(batch(True), 5)
    assert runner.pool() == "pooled"
    assert runner.eplb.state.worker.told() == [("forward", 5), ("step", False, FLAG_PREFILL)]


def test_a_configuration_that_was_updated_is_still_the_main_model_s(runner):
    """vLLM's `update_config` gives the runner another object, of another hash."""
    runner.model_config = model_config("main, updated")
    runner.execute_model(batch(True), 12)
    runner.sample_tokens(None)
    assert runner.eplb.state.worker.told() == [("forward", 12), ("step", False, FLAG_PREFILL)]
    counted = runner.eplb.state.model_states
    assert counted["main"].num_unpadded_tokens_tensors == [12]
    assert counted["draft"].num_unpadded_tokens_tensors == [7]


def test_a_dummy_pass_settles_and_steps_but_is_no_forward_pass(runner):
    assert runner._dummy_run(3) == "dummy"
    settled, step = runner.eplb.state.worker.told()
    assert settled == "settle"
    assert step[:2] == ("step", True)
    assert not runner.eplb.state.in_dummy


def test_what_skips_eplb_or_profiles_does_not_step(runner):
    runner._dummy_run(3, skip_eplb=True)
    runner._dummy_run(3, is_profile=True)
    assert runner.eplb.state.worker.told() == ["settle", "settle"]


def test_a_dummy_pass_that_fails_is_over(runner, monkeypatch):
    monkeypatch.setattr(type(runner), "execute_model", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner._dummy_run(3)
    assert not runner.eplb.state.in_dummy


def test_a_runner_without_a_state_or_with_vllm_s_own_goes_on(runner):
    runner.eplb.state = None
    assert runner.sample_tokens(None) == "sampled"
    assert runner._dummy_run(3) == "dummy"
    runner.eplb.state = SimpleNamespace(
        prepare_forward=lambda *_: None, step=lambda *_, **__: None, should_record_tensor=None
    )
    assert runner._dummy_run(3) == "dummy"
    assert runner.sample_tokens(None) == "sampled"


def test_the_warm_up_counts_nothing_on_either_runner(runner):
    class Worker:
        def __init__(self, model_runner):
            self.model_runner = model_runner

        def compile_or_warm_up_model(self):
            self.model_runner.execute_model(batch(True), 8)
            self.model_runner.sample_tokens(None)
            self.model_runner._dummy_run(8)
            return "warm"

    follow_warm_up(Worker)
    assert Worker(runner).compile_or_warm_up_model() == "warm"
    assert runner.eplb.state.worker.told() == ["settle"]
    assert not runner.eplb.state.warming
    runner.eplb.state.worker = None  # nor is a worker made
    assert Worker(runner).compile_or_warm_up_model() == "warm"
    assert runner.eplb.state.worker is None


@pytest.fixture
def unmade(vllm, monkeypatch):
    """A state whose worker is still to be made, alone in its group; `made` gets its arguments."""
    state = object.__new__(vllm.state.FlashState)
    counts = np.zeros((1, 4))
    state.model_states = {"m": SimpleNamespace(logical_replica_count=counts)}
    state.config, state.parallel_config = None, SimpleNamespace(tensor_parallel_size=1)
    state.made = []
    state._unsupported = lambda states, ranks: ""
    state._make_engine = lambda states, coordinator: SimpleNamespace(models=[("m", 1)])
    coordinator = SimpleNamespace(world_size=2, cpu_group=None)
    monkeypatch.setattr(vllm.state, "get_ep_group", lambda: coordinator)
    monkeypatch.setattr(vllm.state.balanced, "agree", lambda group, reason: reason)
    monkeypatch.setattr(vllm.state.balanced, "group_of", lambda *arguments: None)
    monkeypatch.setattr("flash_eplb.eplb.worker.Worker", lambda *given: state.made.append(given))
    return state


def test_what_the_models_support_is_asked_anew_after_updates(unmade):
    """The worker gets the question that was asked before the start."""
    answers = ["", "w of MoE layer 0 would stay behind"]
    unmade._unsupported = lambda states, ranks: answers.pop(0)
    unmade._make_worker(is_dummy=True)
    *_, experts, unsupported, _ = unmade.made[0]
    assert experts == 4
    assert unsupported() == "w of MoE layer 0 would stay behind"


def test_models_are_looked_at_when_no_rank_writes_their_weights(unmade, monkeypatch, caplog):
    """Before, a drafter's replicas may differ, which would leave it out for ever."""
    writing = ["weights are written"]
    monkeypatch.setattr(balanced, "agree", lambda group, reason: reason or writing[0])
    unmade.step()
    assert unmade.made == []
    unmade.is_writing, writing[0] = True, ""
    unmade.step()
    assert unmade.made == []
    assert ["steps run while an update" in text for text in caplog.messages] == [True]
    unmade.is_writing = False
    unmade.step()
    assert len(unmade.made) == 1


@pytest.mark.parametrize("is_loaded", [True, False])
def test_a_drafter_whose_replicas_were_not_loaded_is_left_out(
    unmade, is_loaded, monkeypatch, caplog
):
    """vLLM loads none for the MTP layers of DeepSeek and GLM; the main model is balanced."""
    main = unmade.model_states["m"]
    drafter = SimpleNamespace(model_name="m (draft)", logical_replica_count=np.zeros((1, 4)))
    unmade.model_states = {"draft": drafter, "m": main}
    unmade._make_engine = lambda states, coordinator: SimpleNamespace(states=states, models=[])
    asked = []

    def take_reference(group, engine, experts):
        asked.append((engine.states, experts))
        if not is_loaded:
            raise UnsupportedError("layer 0 expert 3: the replica on rank 1 has other weights (it)")

    monkeypatch.setattr("flash_eplb.eplb.reference.take_reference", take_reference)
    unmade._make_worker(is_dummy=True)
    assert asked == [([drafter], 4)]
    engine, unsupported = unmade.made[-1][2], unmade.made[-1][-2]
    kept = [drafter, main] if is_loaded else [main]
    assert len(unmade.made) == (1 if is_loaded else 2)
    assert engine.states == kept
    assert unsupported.args[0] == kept  # after updates, too
    assert is_loaded != (
        "leaves the experts of m (draft) where they are, and balances the main model: layer 0 "
        "expert 3: the replica on rank 1 has other weights. vLLM" in caplog.text
    )


def test_of_a_drafter_no_rank_asks_what_another_that_cannot_balance_does_not(unmade, monkeypatch):
    """It would meet that one's words in a collective that is about something else."""
    unmade.model_states = {"draft": SimpleNamespace(model_name="draft"), **unmade.model_states}
    monkeypatch.setattr(balanced, "agree", lambda group, reason: reason or "no kernels on another")
    asked = []
    monkeypatch.setattr("flash_eplb.eplb.reference.take_reference", lambda *_: asked.append(_))
    unmade._make_worker(is_dummy=True)
    assert (asked, unmade.worker) == ([], None)
    assert unmade.inert == "no kernels on another"


@pytest.mark.parametrize("question", ["_unsupported", "_make_engine"])
def test_a_model_that_we_cannot_look_at_is_served_unbalanced(unmade, question, caplog):
    setattr(unmade, question, lambda *_: 1 / 0)
    unmade.step()
    assert unmade.made == []
    assert unmade.inert == "ZeroDivisionError: division by zero"
    assert "does not balance: ZeroDivisionError: division by zero; vLLM serves on" in caplog.text


def test_a_worker_that_cannot_be_made_ends_no_step(unmade, monkeypatch, caplog):
    """As where the disk on which kernels are kept is full: the first import of them fails."""

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("flash_eplb.eplb.worker.Worker", fail)
    unmade.step()
    assert unmade.worker is None
    assert unmade.inert == "OSError: No space left on device"
    assert "does not balance: OSError: No space left on device; vLLM serves on" in caplog.text


def test_weights_that_others_map_are_not_moved_by_us_nor_by_upstream(vllm, monkeypatch):
    """So the state is ours, and inert."""
    base = type("EplbState", (vllm.state.EplbState,), {})
    monkeypatch.setattr(vllm.state, "EplbState", base)
    monkeypatch.setattr(vllm.state, "_reason", lambda *arguments: "")
    monkeypatch.setattr(vllm.state, "lent_weights", lambda vllm_config: "load_format=ipc_cache")
    monkeypatch.setattr(vllm.state, "_warn_of_what_does_nothing", lambda _: None)
    monkeypatch.setattr(vllm.state.balanced, "_balanced", [])
    vllm.state.install(None)
    made = base.__new__(base)
    assert isinstance(made, vllm.state.FlashEplbState)
    assert made.inert == "load_format=ipc_cache"
