"""The ranks of vLLM-Ascend's model runner V2 without an NPU: its real controller, state and tables.

Usage: v2_rank.py ROOT VERSION RANKS SESSION FOLDER CASE...

Each CASE names how the layers keep their experts: "rows" (a tensor [slots, ...]), "lists" (a tensor
per slot), "mixed"; with "/planner" where a real planner plans.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import real
import torch
import torch.distributed as dist
import world
from vllm.v1.worker.gpu.eplb_utils import step_eplb_after

from flash_eplb.eplb.config import load_config
from flash_eplb.eplb.logs import configure

MODULES = {
    "controller": "worker.v2.eplb",
    "state": "distributed.eplb.eplb_state",
    "ops": "ops.fused_moe.eplb",
    "experts": "ops.fused_moe.routed_experts",
    "config": "ascend_config",
}
NAMES = ("w13_weight", "w2_weight", "w13_scale", "w2_scale")


class Layer:
    """What its MoE layers are to the state."""

    def __init__(self):
        self.eplb_state = modules.state.AscendEplbLayerState()


class Model:
    """A mixture-of-experts model as vLLM's state and the controller see it."""

    num_expert_groups = 1
    num_shared_experts = 0

    def __init__(self, kind, placement, rank):
        layers, ranks, slots = placement.shape
        self.num_moe_layers = layers
        self.num_logical_experts = self.num_routed_experts = world.EXPERTS
        self.num_physical_experts = ranks * slots
        self.num_local_physical_experts = slots
        self.num_redundant_experts = ranks * slots - world.EXPERTS
        self.moe_layers = [Layer() for _ in range(layers)]
        self.expert_weights = [
            [self._stack(kind, layer, name, held) for name in NAMES]
            for layer, held in enumerate(placement[:, rank].tolist())
        ]

    def _stack(self, kind, layer, name, held):
        rows = [world.expert_tensor(layer, expert, name).ravel() for expert in held]
        if kind == "lists" or (kind == "mixed" and "weight" in name):
            return modules.experts.EplbExpertTensorList(rows)
        return torch.stack(rows)

    def set_eplb_state(self, expert_load_view, logical_to_physical_map, logical_replica_count):
        for number, layer in enumerate(self.moe_layers):
            layer.eplb_state.set_layer_state(
                number, expert_load_view, logical_to_physical_map, logical_replica_count
            )

    def run(self, seed, ranks):
        """Route a batch by the tables; its own operator records what arrived."""
        for number, layer in enumerate(self.moe_layers):
            state = layer.eplb_state
            chosen = world.chosen_experts(seed, number)
            physical = modules.ops.map_to_physical(chosen, state.expert_replica_routing_table)
            came = world.arrivals(physical, ranks, state.local_expert_count)
            modules.ops.record_expert_tokens(
                came,
                state.expert_load_view,
                state.should_record_tensor,
                1,
                state.local_expert_start,
            )


class ModelConfig:
    model = "a model"

    def compute_hash(self):
        return "hash"


class NPUModelRunner:
    """The calls that its runner makes of the controller (test_v2.py); a dummy pass runs through
    `execute_model`, too."""

    execute_model_state = None

    def __init__(self, controller, model, model_config):
        self.eplb, self.passes = controller, 0
        self._model, self._config = model, model_config

    @property
    def eplb_state(self):
        return self.eplb.state

    def execute_model(self, scheduler_output, dummy_run=False):
        self.passes += 1
        self.eplb.set_batch_phase(self.passes % 2 == 0)
        self.eplb.prepare_forward(self._config, world.TOKENS)
        self._model.run(1000 * self.passes + dist.get_rank(), dist.get_world_size())

    @step_eplb_after()
    def sample_tokens(self, grammar_output):
        return grammar_output

    @step_eplb_after(is_dummy=True)
    def _dummy_run(self, num_tokens, skip_eplb=False, is_profile=False):
        self.execute_model(None, dummy_run=True)


class NPUWorker:
    """Warms up before it serves, with passes that are stepped."""

    def __init__(self, model_runner):
        self.model_runner = model_runner

    def compile_or_warm_up_model(self):
        self.model_runner._dummy_run(3)
        self.model_runner.execute_model(None)
        self.model_runner.sample_tokens(None)


class Case(world.Scenario):
    """One form of layers, from the model's registration to the end of the session."""

    def __init__(self, text, session):
        kind, *modes = text.split("/")
        super().__init__(session, modes)
        ranks, self.rank = coordinator.world_size, coordinator.rank_in_group
        settings = SimpleNamespace(
            use_async=True,
            window_size=8,
            step_interval=16,
            policy="default",
            communicator="torch_gloo",
            log_balancedness=False,
            num_redundant_experts=world.REDUNDANT,
        )
        self.parallel_config = SimpleNamespace(
            enable_eplb=True,
            eplb_config=settings,
            enable_elastic_ep=False,
            enable_dbo=False,
            num_ubatches=0,
            pipeline_parallel_size=1,
            tensor_parallel_size=1,
            data_parallel_size=ranks,
        )
        self.controller = modules.controller.AscendEPLBController(
            self.parallel_config, torch.device("cpu"), modules.config.EplbConfig()
        )
        self.controller.prepare_load()
        self.state = self.controller.state
        assert type(self.state).__name__ == "FlashAscendEplbState"
        assert isinstance(self.state, modules.state.AscendEplbState)
        start = self.state.build_initial_global_physical_to_logical_map
        token = modules.state.EXPERT_MAPPING_EP_SIZE.set(ranks)
        flat = np.array(start(world.EXPERTS, world.REDUNDANT), np.int32)
        modules.state.EXPERT_MAPPING_EP_SIZE.reset(token)
        placement = np.repeat(flat.reshape(1, ranks, -1), world.LAYERS, axis=0)
        self.model = Model(kind, placement, self.rank)
        self.model_config = ModelConfig()
        self.state.add_model(self.model, self.model_config)
        self.controller._has_registered_models = True
        self.runner = NPUModelRunner(self.controller, self.model, self.model_config)
        assert not self.state.is_async
        self.start = placement

    @property
    def worker(self):
        return self.state.worker

    def step(self, dummy=False):
        if dummy:
            self.runner._dummy_run(1)
        else:
            self.runner.execute_model(None)
            self.runner.sample_tokens(None)
        self.hand.turn()

    def run(self):
        self.runner._dummy_run(9, is_profile=True)
        NPUWorker(self.runner).compile_or_warm_up_model()
        assert self.worker is None
        self.step(dummy=True)
        assert self.worker is not None, self.state.inert
        assert not self.worker.refused, self.worker.refused
        assert np.array_equal(self.worker.placement, self.start)
        self.check()
        self.move_experts()
        self.check_heat()
        assert not self.worker.has_stopped
        self.hand.close()
        self.worker.close()

    def check(self):
        """Weights, maps and routing tables of this rank are those of the placement."""
        placement = self.worker.placement
        (state,) = self.state.model_states.values()
        for number, layer in enumerate(self.model.moe_layers):
            for slot, expert in enumerate(placement[number, self.rank].tolist()):
                for stack, name in zip(self.model.expert_weights[number], NAMES, strict=True):
                    wanted = world.expert_tensor(number, expert, name).ravel()
                    assert torch.equal(stack[slot], wanted), (number, slot, name)
            flat = placement[number].ravel()
            assert np.array_equal(state.physical_to_logical_map[number].numpy(), flat)
            route = layer.eplb_state.expert_replica_routing_table
            address, found = route.data_ptr(), route.clone()
            assert (flat[found.numpy()] == np.arange(world.EXPERTS)).all()
            modules.state.refresh_model_routing_tables(state, number)  # theirs, from the maps
            route = layer.eplb_state.expert_replica_routing_table
            assert route.data_ptr() == address
            assert torch.equal(route, found)


def run(text, name):
    vllm_state.install(load_config())
    Case(text, name).run()


if __name__ == "__main__":
    root, version, ranks_text, session, folder, *cases = sys.argv[1:]
    ranks = int(ranks_text)
    modules = real.load(root, version, MODULES)
    from vllm.distributed import parallel_state
    from vllm.distributed.eplb import eplb_state

    from flash_eplb.eplb import ascend, ascend_v2, vllm_state

    real.module(ascend_v2.RUNNER, NPUModelRunner=NPUModelRunner)
    real.module(ascend.WORKER, NPUWorker=NPUWorker)
    eplb_state.EplbState.cuda_device_index = 0  # of the vLLM that this version is for
    rank = real.fork(ranks, folder)
    coordinator = real.join(rank, ranks, folder)
    parallel_state._EP = parallel_state._EPLB = coordinator
    configure("INFO")
    world.run_cases(cases, session, run)
