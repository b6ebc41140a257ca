"""The hooks in vLLM-Ascend, on stand-ins; its own classes are in tests/ascend."""

import sys
from importlib.metadata import EntryPoint
from types import ModuleType, SimpleNamespace

import pytest
import torch

from flash_eplb.eplb import ascend, ascend_v2, balanced
from flash_eplb.eplb.config import Config

EXPERTS = 6


class EplbUpdator:
    """As vLLM-Ascend's, which a runner makes with its own planner process."""

    def __init__(self, eplb_config, loader, eplb_process, process):
        self.process = process

    def set_adaptor(self, adaptor):
        self.adaptor = adaptor

    def warm_up_eplb(self):
        raise AssertionError("its own planner is not there")

    def forward_before(self):
        raise AssertionError("its own planner is not there")

    def forward_end(self, eplb_heat_collection_status=True):
        raise AssertionError("its own planner is not there")

    def shutdown(self):
        self.process.alive = False


class VllmEplbAdaptor:
    def init_expert_param_per_layer(self):
        pass

    def init_buffer_tensor(self, num_buffer_tensor):
        pass


@pytest.fixture
def module(monkeypatch):
    """A fresh module of the updator's name, with classes of its own."""
    made = ModuleType(ascend.UPDATOR)
    made.EplbUpdator = type("EplbUpdator", (EplbUpdator,), {})
    made.VllmEplbAdaptor = VllmEplbAdaptor
    monkeypatch.setitem(sys.modules, ascend.UPDATOR, made)
    monkeypatch.setattr(balanced, "_balanced", [])
    monkeypatch.setattr(ascend, "_configs", lambda: (None, None, False))
    return made


def make(module, **settings):
    eplb_config = SimpleNamespace(**{"expert_map_record_path": None, **settings})
    process = SimpleNamespace(alive=True)
    return module.EplbUpdator(eplb_config, None, None, process)


def test_the_updator_is_ours_and_ends_the_planner_that_came_with_it(module):
    ascend.hook_runner_v1(Config())
    ascend.hook_runner_v1(Config())  # of a second worker
    updator = make(module)
    assert isinstance(updator, ascend.FlashUpdator)
    assert isinstance(updator, module.EplbUpdator)
    assert not updator.process.alive
    assert balanced.is_worker()


def test_a_mode_that_is_not_supported_is_left_to_upstream(module, monkeypatch, caplog):
    config = SimpleNamespace(pipeline_parallel_size=2)
    monkeypatch.setattr(ascend, "_configs", lambda: (config, None, False))
    ascend.hook_runner_v1(Config())
    updator = make(module)
    assert type(updator) is module.EplbUpdator
    assert updator.process.alive
    assert "pipeline_parallel_size=2" in caplog.text
    assert "vLLM-Ascend's own balancer stays in charge" in caplog.text


def test_ranks_without_us_leave_upstream_in_charge_here_too(module, monkeypatch, caplog):
    monkeypatch.setattr(balanced, "where_we_are_not", lambda: "EP ranks [1] have not come")
    ascend.hook_runner_v1(Config())
    assert type(make(module)) is module.EplbUpdator
    assert "EP ranks [1] have not come; vLLM-Ascend's own balancer" in caplog.text


@pytest.mark.parametrize("place", [(ascend, "_configs"), (balanced, "where_we_are_not")])
def test_what_fails_while_we_ask_leaves_upstream_in_charge(module, monkeypatch, caplog, place):
    """The settings, or the meeting of the ranks: each is named as what it is."""

    def fail():
        raise RuntimeError("connection reset by peer")

    monkeypatch.setattr(*place, fail)
    ascend.hook_runner_v1(Config())
    assert type(make(module)) is module.EplbUpdator
    assert "does not balance: RuntimeError: connection reset by peer; vLLM-Ascend" in caplog.text
    assert "Traceback" in caplog.text


def test_weights_that_other_engines_copy_stay_where_they_are(module, monkeypatch, caplog):
    """Upstream's balancer, which would move them too, stays away as well."""
    monkeypatch.setattr(ascend, "lent_weights", lambda vllm_config: "load_format=netloader")
    monkeypatch.setattr(balanced, "agree", lambda group, reason: reason)
    ascend.hook_runner_v1(Config())
    updator = make(module)
    updator.comm_group, updator.adaptor = SimpleNamespace(cpu_group=None), adaptor(layer())
    updator.warm_up_eplb()
    updator.forward_before()
    updator.forward_end()
    assert updator.worker is None
    assert "does not balance: load_format=netloader; vLLM-Ascend serves on" in caplog.text


def test_a_worker_is_made_even_if_the_hook_fails(monkeypatch, caplog):
    class WorkerBase:
        made = False

        def __init__(self):
            self.made = True

    def fail(config):
        raise AttributeError("no EplbUpdator")

    base = SimpleNamespace(WorkerBase=WorkerBase)
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.worker_base", base)
    monkeypatch.setattr(ascend, "hook_runner_v1", fail)
    ascend.install(Config())
    assert WorkerBase().made
    assert "flash_eplb does not fit this vLLM-Ascend" in caplog.text


def test_an_updator_that_we_do_not_know_is_left_alone(module, caplog):
    del module.VllmEplbAdaptor
    module.EplbUpdator.forward_end = None
    ascend.hook_runner_v1(Config())
    assert type(make(module)) is module.EplbUpdator
    assert "this vLLM-Ascend has no EplbUpdator.forward_end, VllmEplbAdaptor.init_" in caplog.text


def test_a_record_path_of_upstream_is_pointed_to_ours(module, caplog):
    ascend.hook_runner_v1(Config())
    make(module, expert_map_record_path="map.json")
    assert "expert_map_record_path=map.json does nothing" in caplog.text
    assert "EPLB_SAVE_PLACEMENT" in caplog.text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism (pipeline_parallel_size=2)"),
        ({"enable_elastic_ep": True}, "elastic expert parallelism"),
        ({"enable_fault_tolerance": True}, "fault tolerance"),
        ({"use_ubatching": True}, "dual batch overlap"),
    ],
)
def test_groups_that_cannot_be_balanced_are_refused_by_name(changes, reason):
    fine = {"pipeline_parallel_size": 1, "enable_elastic_ep": False, "use_ubatching": False}
    assert ascend.unsupported_group(SimpleNamespace(**fine)) == ""
    assert reason in ascend.unsupported_group(SimpleNamespace(**fine | changes))
    mixed = SimpleNamespace(mix_placement=True)
    assert "mix_placement" in ascend.unsupported_group(SimpleNamespace(**fine), mixed)
    assert "a pooling model" in ascend.unsupported_group(SimpleNamespace(**fine), pools=True)
    assert "sleep mode" in ascend.unsupported_group(SimpleNamespace(**fine), use="sleep mode")


def layer(ranks=2, **changes):
    fields = {
        "moe_load": torch.zeros(3, dtype=torch.int64),
        "global_expert_map": torch.zeros(ranks, EXPERTS, dtype=torch.int32),
        "get_log2phy_map": lambda: torch.zeros(EXPERTS, dtype=torch.int32),
        "ep_rank": 0,
    }
    return SimpleNamespace(**{k: v for k, v in (fields | changes).items() if v is not ...})


def adaptor(*layers, **changes):
    fields = dict.fromkeys(ascend.OF_ADAPTOR, ()) | {"moe_layers": layers} | changes
    return SimpleNamespace(**{k: v for k, v in fields.items() if v is not ...})


def test_layers_that_cannot_be_balanced_are_refused_by_name():
    refusal = ascend.unsupported_layers
    assert refusal(adaptor(layer(), layer())) == ""
    assert "no mixture-of-experts layer" in refusal(adaptor())
    for name in ascend.OF_ADAPTOR:
        assert f"VllmEplbAdaptor has no {name}" in refusal(adaptor(layer(), **{name: ...}))
    for name in ascend.OF_LAYER:
        found = refusal(adaptor(layer(), layer(**{name: ...})))
        assert f"MoE layer 1 of this vLLM-Ascend has no {name}" in found
    biased = layer(w2_bias=torch.zeros(3, 4))
    assert "MoE layer 1 has w2_bias, a bias per expert" in refusal(adaptor(layer(), biased))
    assert refusal(adaptor(layer(w13_bias=None))) == ""
    unrouted = layer(get_log2phy_map=lambda: None)
    assert "MoE layer 0 routes by no table" in refusal(adaptor(unrouted))
    wide = layer(global_expert_map=torch.zeros(2, EXPERTS + 1))
    assert "shape (2, 7) and layer 0 one of (2, 6)" in refusal(adaptor(layer(), wide))
    assert "EP group of one rank" in refusal(adaptor(layer(ranks=1)))


class Worker:
    def __init__(self):
        self.told = []

    def forward(self, tokens):
        self.told.append(("forward", tokens))

    def settle(self):
        self.told.append("settle")

    def step(self, is_dummy, phase):
        self.told.append(("step", is_dummy))


def test_the_runner_tells_of_tokens_and_of_dummy_passes(module):
    class Runner:
        input_batch = None
        fails = False

        def execute_model(self, scheduler_output, intermediate_tensors=None):
            self.eplb_updator.forward_before()
            self.eplb_updator.forward_end(True)
            return intermediate_tensors

        def _dummy_run(self, tokens, is_profile=False):
            self.eplb_updator.forward_before()
            if self.fails:
                raise RuntimeError("out of memory")
            self.eplb_updator.forward_end(True)

    ascend.hook_runner_v1(Config())
    ascend.follow_runner(Runner)
    ascend.follow_runner(Runner)
    runner = Runner()
    runner.eplb_updator = make(module)
    worker = runner.eplb_updator.worker = Worker()
    assert runner.execute_model(SimpleNamespace(total_num_scheduled_tokens=5), "it") == "it"
    runner._dummy_run(1)
    runner.fails = True
    with pytest.raises(RuntimeError):
        runner._dummy_run(1)
    runner.execute_model(SimpleNamespace(total_num_scheduled_tokens=6))
    assert worker.told == [
        ("forward", 5),
        ("step", False),
        "settle",
        ("step", True),
        "settle",
        ("forward", 6),
        ("step", False),
    ]


def test_a_pooling_model_that_the_configuration_hides_steps_nowhere(module, caplog):
    class Runner:
        input_batch = None
        is_pooling_model = True

        def execute_model(self, scheduler_output):
            self.eplb_updator.forward_before()  # and no forward_end

        def _dummy_run(self, tokens):
            self.eplb_updator.forward_before()
            self.eplb_updator.forward_end(True)

    ascend.hook_runner_v1(Config())
    ascend.follow_runner(Runner)
    runner = Runner()
    runner.eplb_updator = make(module)
    worker = runner.eplb_updator.worker = Worker()
    runner._dummy_run(1)
    runner.execute_model(SimpleNamespace(total_num_scheduled_tokens=5))
    assert not worker.told
    assert caplog.text.count("a pooling model") == 1


def test_a_runner_that_never_warms_us_up_is_complained_about_once(module, caplog):
    ascend.hook_runner_v1(Config())
    updator = make(module)
    for _ in range(2):
        updator.forward_before()
        updator.forward_end(True)
    assert caplog.text.count("has not called eplb_warmup before its first pass") == 1


@pytest.mark.parametrize(
    ("allowed", "found"),
    [(None, ""), ("flash_eplb", "ascend"), ("", "ascend"), ("ascend, flash_eplb", "")],
)
def test_a_list_of_plug_ins_without_ascend_s_platform_is_noticed(monkeypatch, allowed, found):
    installed = [
        EntryPoint("ascend", "vllm_ascend:register", "vllm.platform_plugins"),
        EntryPoint("other", "other:register", "vllm.platform_plugins"),
    ]
    monkeypatch.setattr(ascend, "entry_points", lambda group: installed)
    assert ascend.left_out(ascend.platforms(), allowed) == found
    monkeypatch.setattr(ascend, "entry_points", lambda group: installed[1:])
    assert ascend.left_out(ascend.platforms(), allowed) == ""


def test_an_engine_that_balances_nothing_is_noticed():
    def off(additional):
        return ascend.is_off(SimpleNamespace(additional_config=additional))

    assert '"dynamic_eplb": true' in off(None)
    assert '"dynamic_eplb": true' in off({"eplb_config": {"dynamic_eplb": False}})
    assert off({"eplb_config": {"dynamic_eplb": True}}) == ""
    assert off({"eplb_config": {"expert_map_record_path": "x.json"}}) == ""


def test_a_state_of_runner_v2_is_known_by_its_module(monkeypatch):
    state = type("AscendEplbState", (), {"__module__": ascend_v2.STATE})
    assert ascend_v2.is_state(state)
    assert not ascend_v2.is_state(EplbUpdator)
    config = SimpleNamespace(pipeline_parallel_size=1)
    assert "has no vllm_ascend.ops.fused_moe.eplb.build_" in ascend_v2.reason(config)
    routing = SimpleNamespace(build_expert_replica_routing_table=lambda *_: None)
    monkeypatch.setitem(sys.modules, ascend_v2.ROUTING, routing)
    assert ascend_v2.reason(config) == ""
    assert "in an unknown way" in ascend_v2.reason()
    config.pipeline_parallel_size = 2
    assert "pipeline parallelism" in ascend_v2.reason(config)


def test_a_layer_that_routes_in_another_way_is_refused_by_name():
    routed = SimpleNamespace(eplb_state=SimpleNamespace(expert_replica_routing_table="a table"))
    for other in (SimpleNamespace(), SimpleNamespace(eplb_state=SimpleNamespace())):
        model = SimpleNamespace(moe_layers=[routed, other])
        states = [SimpleNamespace(model=model, model_name="m")]
        assert "m: MoE layer 1 has no expert_replica_routing" in ascend_v2.unrouted(states)
        model.moe_layers.pop()
        assert ascend_v2.unrouted(states) == ""
