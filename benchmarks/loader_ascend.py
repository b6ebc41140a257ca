"""vLLM-Ascend's D2D loader: a layer's experts move during one step, and its end waits for them."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import time
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from . import peers
from .loader_rank import REST, Rank, Sample

NAME = "vLLM-Ascend D2D"
PARTS = (
    "w13_weight_list",
    "w2_weight_list",
    "w13_weight_scale_fp32_list",
    "w2_weight_scale_list",
)
PACKAGES = ("", ".eplb", ".eplb.core", ".eplb.adaptor", ".quantization")
_comm_group = SimpleNamespace()  # what its code takes for the dynamic EPLB group


class Ascend:
    """Its adaptor, loader and updator around one rank's weights; only the device is missing."""

    def __init__(self, rank: Rank):
        self._modules = modules()
        cell = rank.scenario.cell
        self._rank = rank
        self.weights = rank.new_weights()
        vars(_comm_group).update(
            ranks=list(range(rank.size)),
            rank_in_group=rank.rank,
            world_size=rank.size,
            device_group=rank.new_group(),
        )
        adaptor = self._adaptor()
        self.staging = cell.slots * cell.row_bytes
        self._loader = self._modules.loader.D2DExpertWeightLoader()
        self._loader.set_adator(adaptor)
        self._updator = object.__new__(self._modules.updator.EplbUpdator)
        vars(self._updator).update(
            eplb_loader=self._loader,
            adaptor=adaptor,
            num_moe_layers=cell.layers,
            expert_heat_collection_interval=2,
            algorithm_execution_interval=2,
            expert_map_record_path=None,
            reqs=[],
        )

    def _adaptor(self) -> Any:
        """Its own, over W8A8 layers: two weights and their scales, as lists of experts."""
        cell, start, kind = self._rank.scenario.cell, self._rank.scenario.start, self._modules
        layers = []
        for number, tensors in enumerate(self.weights):
            maps = _expert_maps(start[number], cell.experts)
            log2phy = self._log2phy(maps)
            layer = SimpleNamespace(
                local_num_experts=cell.slots,
                ep_rank=self._rank.rank,
                quant_type=kind.quant.QuantType.W8A8,
                global_expert_map=maps,
                get_log2phy_map=lambda log2phy=log2phy: log2phy,
                clear_moe_load=lambda: None,
            )
            for name, tensor in zip(PARTS, tensors, strict=True):
                setattr(layer, name, list(tensor.unbind(0)))
            layers.append(layer)
        kind.adaptor.VllmEplbAdaptor._registered_moe_layers = layers
        config = SimpleNamespace(first_k_dense_replace=0)
        adaptor = kind.adaptor.VllmEplbAdaptor(SimpleNamespace(config=config, quant_config=1))
        adaptor.get_global_expert_map()
        return adaptor

    def _log2phy(self, maps: torch.Tensor) -> torch.Tensor:
        return self._modules.utils.generate_log2phy_map(maps, self._rank.rank)

    def _tasks(self, number: int) -> list[Any]:
        """What its planner process hands over for plan `number`."""
        plan, cell = self._rank.scenario.plans[number], self._rank.scenario.cell
        before, after = (
            torch.stack([_expert_maps(layer, cell.experts) for layer in placement])
            for placement in (plan.before, plan.placement)
        )
        worker = self._modules.worker.EplbWorker
        me = SimpleNamespace(rank_id=self._rank.rank, tp_size=None)
        return worker.pack_update_info(
            me, worker.compose_expert_update_info_greedy(me, after, before)
        )

    def move(self, number: int) -> Sample:
        """A layer per step: start before the forward pass, wait and copy behind it."""
        self._updator.update_info_all = self._tasks(number)
        self._updator.cur_iterations = 4  # where the updating of weights begins
        resting = self._rank.rest(REST // 2)
        clock = time.monotonic_ns
        stalls, received = [], 0
        began = clock()
        while self._updator.update_info_all:
            begin = clock()
            self._updator.forward_before()
            between = clock()
            received += self._arriving()
            self._rank.compute()
            over = clock()
            self._updator.forward_end()
            stalls.append((between - begin + clock() - over) / 1e3)
        took = (clock() - began) / 1e3
        return Sample(
            stall=sum(stalls),
            longest=max(stalls),
            total=took,
            received=received,
            steps=len(stalls),
            resting=resting,
            moving=took / len(stalls),
        )

    def _arriving(self) -> int:
        ops = self._loader.comm_op_list or []
        return sum(op.tensor.nbytes for op in ops if op.op is dist.irecv)


def _expert_maps(placement: np.ndarray, experts: int) -> torch.Tensor:
    """int32 [ranks, experts]: the slot of each expert, -1 where a rank does not hold it."""
    maps = torch.full((len(placement), experts), -1, dtype=torch.int32)
    for rank, held in enumerate(placement.tolist()):
        maps[rank, held] = torch.arange(len(held), dtype=torch.int32)
    return maps


@cache
def modules() -> SimpleNamespace:
    """Its modules, imported from the source distribution without what a device needs.

    Raises:
        peers.PeerError: it cannot be fetched or imported.
    """
    root = peers.ascend_source()
    for name in PACKAGES:
        package = ModuleType(f"vllm_ascend{name}")
        package.__path__ = [str(root.joinpath(*name.split(".")))]
        package.__spec__ = importlib.machinery.ModuleSpec(package.__name__, None, is_package=True)
        sys.modules[package.__name__] = package
    _stub("distributed.parallel_state", get_dynamic_eplb_group=lambda: _comm_group)
    _stub("ascend_config", get_ascend_config=lambda: SimpleNamespace(enable_fused_mc2=0))
    _stub("eplb.core.policy.policy_factory", PolicyFactory=None)
    names = {
        "loader": "eplb.core.eplb_device_transfer_loader",
        "utils": "eplb.core.eplb_utils",
        "worker": "eplb.core.eplb_worker",
        "adaptor": "eplb.adaptor.vllm_adaptor",
        "updator": "eplb.eplb_updator",
        "quant": "quantization.quant_type",
    }
    try:
        found = {key: importlib.import_module(f"vllm_ascend.{n}") for key, n in names.items()}
    except ImportError as error:
        raise peers.PeerError(f"the D2D loader does not import: {error}") from error
    return SimpleNamespace(**found)


def _stub(name: str, **contents: Any) -> None:
    """A stand-in for a module of vllm_ascend, and for the package that it lies in."""
    parent, _, _ = name.rpartition(".")
    for full in filter(None, (parent, name)):
        sys.modules.setdefault(f"vllm_ascend.{full}", ModuleType(f"vllm_ascend.{full}"))
    vars(sys.modules[f"vllm_ascend.{name}"]).update(contents)
