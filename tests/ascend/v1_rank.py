"""The ranks of vLLM-Ascend's model runner V1 without an NPU: its real adaptor, loader and updator.

Usage: v1_rank.py ROOT VERSION RANKS SESSION FOLDER CASE...

Each CASE is a quantisation with its number of the fused MC2 mode ("W8A8/0"), with "/multi" where
layers count step by step, "/map" where they begin by an expert map, "/planner" where a real planner
plans. After every commit the weights and maps are compared with what the placement says.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import real
import torch
import torch.distributed as dist
import world

from flash_eplb.eplb import ascend
from flash_eplb.eplb.config import load_config
from flash_eplb.eplb.logs import configure
from flash_eplb.loaders.routing import chosen_replicas
from flash_eplb.planners.expert_map import SavedPlacement, read_map

MODULES = {
    "updator": "eplb.eplb_updator",
    "adaptor": "eplb.adaptor.vllm_adaptor",
    "loader": "eplb.core.eplb_device_transfer_loader",
    "worker": "eplb.core.eplb_worker",
    "utils": "eplb.core.eplb_utils",
    "parallel": "distributed.parallel_state",
    "config": "ascend_config",
    "quant": "quantization.quant_type",
}


class Layer:
    """What its MoE layers are to the adaptor and the updator; the maps are made by its own code."""

    def __init__(self, number, names, kind, eplb_config, moe_config):
        maps = modules.utils.init_eplb_config(eplb_config, number, moe_config)
        self.global_expert_map, self._expert_map, self.log2phy, _ = maps
        self.ep_rank = moe_config.ep_rank
        self.quant_type = kind
        mine = self.global_expert_map[self.ep_rank]
        held = [int((mine == slot).nonzero()) for slot in range(int(mine.max()) + 1)]
        self.local_num_experts = len(held)
        self.multi_stage = eplb_config.eplb_policy_type == 3
        self.num_iter = 5
        self.load_counter = torch.tensor(0, dtype=torch.int32)
        self.moe_load = torch.zeros(len(held), dtype=torch.int64)
        if self.multi_stage:
            self.moe_load = torch.zeros((self.num_iter, len(held)), dtype=torch.int32)
        for name in names:
            rows = [world.expert_tensor(number, expert, name) for expert in held]
            setattr(self, name, rows if name.endswith("_list") else torch.stack(rows))

    def get_log2phy_map(self):
        return self.log2phy

    def clear_moe_load(self):
        self.moe_load.zero_()
        self.load_counter.zero_()

    def run(self, number, seed, ranks):
        """Route a batch by the table; count what arrived."""
        physical = self.log2phy[world.chosen_experts(seed, number)]
        came = world.arrivals(physical, ranks, self.local_num_experts)
        if self.multi_stage:
            self.moe_load[int(self.load_counter) % self.num_iter] += came.to(torch.int32)
            self.load_counter += 1
        else:
            self.moe_load += came


class NPUModelRunner:
    """The calls that its runner makes of the updator, in its order (test_sources.py)."""

    def __init__(self, eplb_config, layers, ranks):
        self.layers, self._ranks = layers, ranks
        process = FakeProcess()
        holder = SimpleNamespace(shared_dict={})
        loader = modules.loader.D2DExpertWeightLoader()
        self.eplb_updator = modules.updator.EplbUpdator(eplb_config, loader, holder, process)
        modules.adaptor.VllmEplbAdaptor._registered_moe_layers = layers
        config = SimpleNamespace(first_k_dense_replace=0)
        quantized = None if layers[0].quant_type is modules.quant.QuantType.NONE else 1
        model = SimpleNamespace(config=config, quant_config=quantized)
        self.eplb_adaptor = modules.adaptor.VllmEplbAdaptor(model=model)
        loader.set_adator(self.eplb_adaptor)
        self.eplb_updator.set_adaptor(self.eplb_adaptor)
        self.eplb_updator.warm_up_eplb()
        assert not process.alive
        self.input_batch = SimpleNamespace(
            num_reqs=1, num_computed_tokens_cpu=np.array([9]), num_prompt_tokens=np.array([4])
        )
        self.passes = 0

    def execute_model(self, scheduler_output):
        self.eplb_updator.forward_before()
        self._pass()

    def _dummy_run(self, tokens):
        self.eplb_updator.forward_before()
        self._pass()

    def _pass(self):
        self.passes += 1
        for number, layer in enumerate(self.layers):
            layer.run(number, 1000 * self.passes + dist.get_rank(), self._ranks)
        self.eplb_updator.forward_end(True)


class NPUWorker:
    """Warms up before it serves."""

    def __init__(self, model_runner):
        self.model_runner = model_runner

    def compile_or_warm_up_model(self):
        self.model_runner._dummy_run(3)


class FakeProcess:
    """Its planner process, which must not outlive our coming."""

    pid = 0

    def __init__(self):
        self.alive = True

    def is_alive(self):
        return self.alive

    def terminate(self):
        self.alive = False

    def join(self, timeout=None):
        return


class Case(world.Scenario):
    """One quantisation in one mode, from the layers to the end of the session."""

    def __init__(self, text, session, folder):
        name, fused, *modes = text.split("/")
        super().__init__(session, modes)
        self.folder = Path(folder)
        self.kind = modules.quant.QuantType[name]
        table = modules.adaptor.EPLB_EXPERT_WEIGHT_NAMES
        like = modules.quant.QuantType.W8A8 if "refused" in modes else self.kind
        self.names = table[like, fused == "1"]
        settings = {"dynamic_eplb": True, "num_redundant_experts": world.REDUNDANT}
        if "multi" in modes:
            settings["eplb_policy_type"] = 3
        if "map" in modes:
            settings["expert_map_path"] = str(self._write_map())
        make = modules.config.EplbConfig
        takes_fields = "dynamic_eplb" in vars(make)
        eplb_config = make(**settings) if takes_fields else make(settings)
        modules.config._ASCEND_CONFIG = SimpleNamespace(
            eplb_config=eplb_config,
            enable_fused_mc2=int(fused),
            vllm_config=None,
            mix_placement=False,
            ascend_compilation_config=None,
        )
        ranks, rank = coordinator.world_size, coordinator.rank_in_group
        moe = SimpleNamespace(num_experts=world.EXPERTS, ep_size=ranks, ep_rank=rank)
        layers = [
            Layer(number, self.names, self.kind, eplb_config, moe) for number in range(world.LAYERS)
        ]
        if "refused" in modes:
            self.check_refusal(eplb_config, layers)
            return
        self.runner = NPUModelRunner(eplb_config, layers, ranks)
        self.worker = self.runner.eplb_updator.worker
        assert self.worker is not None, self.runner.eplb_updator.inert

    def check_refusal(self, eplb_config, layers):
        """Its adaptor refuses these layers, so there is no engine that we could be asked for."""
        with pytest.raises((RuntimeError, ValueError), match=f"EPLB not support {self.kind}"):
            NPUModelRunner(eplb_config, layers, coordinator.world_size)

    def _write_map(self):
        ranks = coordinator.world_size
        cells = np.arange(world.EXPERTS + world.REDUNDANT).reshape(1, ranks, -1) % world.EXPERTS
        start = world.random_placement(5, np.repeat(cells, world.LAYERS, axis=0))
        path = self.folder / f"{self.session}-{coordinator.rank_in_group}.json"
        SavedPlacement(str(path)).save(start)
        self.start = start
        return path

    def step(self, dummy=False):
        if dummy:
            self.runner._dummy_run(1)
        else:
            self.runner.execute_model(SimpleNamespace(total_num_scheduled_tokens=world.TOKENS))
        self.hand.turn()

    def run(self):
        if "refused" in self.modes:
            return
        NPUWorker(self.runner).compile_or_warm_up_model()
        assert not self.worker._started
        self.step(dummy=True)
        assert not self.worker.refused, self.worker.refused
        if "map" in self.modes:
            assert np.array_equal(self.worker.placement, self.start)
        self.check()
        self.move_experts()
        if "planner" not in self.modes:
            self.check_rerouting()
        self.check_heat()
        assert not self.worker.has_stopped
        placement = self.worker.placement.copy()
        self.hand.close()
        self.worker.close()
        self.check_saved(placement)
        self.check_their_cycle(placement)

    def check_rerouting(self):
        """Nothing moves, and each rank sends to the replica that the columns give it."""
        placement, epoch = self.worker.placement, self.worker.epoch
        columns = np.ones(placement.shape, np.int16)
        mine = []
        for number, held in enumerate(placement):
            replicas = np.bincount(held.ravel())
            for expert in np.flatnonzero(replicas > 1):
                rank, slot = np.argwhere(held == expert)[-1]  # the last one gets what is left
                columns[number, rank, slot] = coordinator.world_size + 1 - replicas[expert]
            mine.append(chosen_replicas(held, world.EXPERTS, columns[number]))
        self.hand.reroute(self.worker, columns)
        self.steps_until(lambda: self.worker.epoch > epoch)
        assert np.array_equal(self.worker.placement, placement)
        self.check()
        for layer, chosen in zip(self.runner.layers, mine, strict=True):
            assert np.array_equal(layer.log2phy.numpy(), chosen[coordinator.rank_in_group])

    def check(self, placement=None):
        """Weights and maps of this rank are those of the placement."""
        placement = self.worker.placement if placement is None else placement
        mine = coordinator.rank_in_group
        slots = placement.shape[2]
        for number, layer in enumerate(self.runner.layers):
            for slot, expert in enumerate(placement[number, mine].tolist()):
                for name in self.names:
                    wanted = world.expert_tensor(number, expert, name)
                    assert torch.equal(getattr(layer, name)[slot], wanted), (number, slot, name)
            flat = placement[number].ravel()
            table = layer.log2phy.numpy()
            assert table.dtype == np.int32
            assert (flat[table] == np.arange(world.EXPERTS)).all(), (number, table)
            where = np.full((len(placement[number]), world.EXPERTS), -1)
            for rank, held in enumerate(placement[number]):
                where[rank, held] = np.arange(slots)
            assert np.array_equal(layer.global_expert_map.numpy(), where)
        theirs = self.runner.eplb_adaptor.get_global_expert_map()
        assert theirs.shape == (world.LAYERS, coordinator.world_size, world.EXPERTS)

    def check_saved(self, placement):
        """Its reader of expert maps finds in our file what we have placed."""
        path = self.folder / f"saved-{self.session}-{coordinator.rank_in_group}.json"
        SavedPlacement(str(path)).save(placement)
        for number in range(world.LAYERS):
            theirs, count = modules.utils.expert_file_to_tensor(str(path), number)
            assert np.array_equal(theirs.numpy(), placement[number])
            assert count == placement[number].size
        exported = self.folder / f"theirs-{self.session}-{coordinator.rank_in_group}.json"
        adaptor = self.runner.eplb_adaptor
        adaptor.rank_id = 0
        adaptor._export_tensor_to_file(adaptor.get_global_expert_map(), str(exported))
        assert np.array_equal(read_map(exported).placement, placement)

    def check_their_cycle(self, placement):
        """Its own loader goes on from where ours has left the experts."""
        layers, adaptor = self.runner.layers, self.runner.eplb_adaptor
        before = adaptor.get_global_expert_map()
        wanted = world.random_placement(30, placement)
        after = torch.full_like(before, -1)
        for number in range(world.LAYERS):  # an expert that stays on its rank stays in its slot
            for rank, held in enumerate(wanted[number].tolist()):
                kept = {
                    e: int(before[number, rank, e]) for e in held if before[number, rank, e] >= 0
                }
                free = sorted(set(range(len(held))) - set(kept.values()))
                for expert in held:
                    slot = kept[expert] if expert in kept else free.pop(0)
                    after[number, rank, expert] = slot
        me = SimpleNamespace(rank_id=coordinator.rank_in_group, tp_size=None)
        theirs = modules.worker.EplbWorker
        tasks = theirs.pack_update_info(
            me, theirs.compose_expert_update_info_greedy(me, after, before)
        )
        loader = modules.loader.D2DExpertWeightLoader()
        loader.set_adator(adaptor)
        updator = object.__new__(modules.updator.EplbUpdator)
        vars(updator).update(
            eplb_loader=loader,
            adaptor=adaptor,
            num_moe_layers=world.LAYERS,
            expert_heat_collection_interval=2,
            algorithm_execution_interval=2,
            expert_map_record_path=None,
            reqs=[],
            update_info_all=tasks,
            cur_iterations=4,
        )
        while updator.update_info_all:
            updator.forward_before()
            updator.forward_end()
        for number, layer in enumerate(layers):  # it keeps only its own row of the map
            layer.global_expert_map.copy_(after[number])
        reached = np.stack([ascend_placement(after[number]) for number in range(world.LAYERS)])
        self.check(reached)


def ascend_placement(where):
    ranks, slots = where.shape[0], int(where.max()) + 1
    placement = np.full((ranks, slots), -1)
    for rank, row in enumerate(where.tolist()):
        for expert, slot in enumerate(row):
            if slot >= 0:
                placement[rank, slot] = expert
    return placement


def run(text, name):
    if "__new__" in vars(modules.updator.EplbUpdator):
        del modules.updator.EplbUpdator.__new__
    ascend.hook_runner_v1(load_config())
    Case(text, name, folder).run()


if __name__ == "__main__":
    root, version, ranks_text, session, folder, *cases = sys.argv[1:]
    ranks = int(ranks_text)
    os.environ["DYNAMIC_EPLB"] = "true"
    modules = real.load(root, version, MODULES)
    rank = real.fork(ranks, folder)
    coordinator = real.join(rank, ranks, folder)
    modules.parallel._DYNAMIC_EPLB = coordinator
    real.module(ascend.RUNNER, NPUModelRunner=NPUModelRunner)
    real.module(ascend.WORKER, NPUWorker=NPUWorker)
    configure("INFO")
    world.run_cases(cases, session, run)
