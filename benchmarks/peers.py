"""Balancers of vLLM and vLLM-Ascend, fetched when a benchmark runs, behind one interface."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Protocol
from unittest.mock import patch

import numpy as np

FOLDER = Path(__file__).resolve().parents[1] / "build" / "peers"
ASCEND = "0.23.0"
REFERENCE, SWIFT, VLLM = "FlashLB reference", "SwiftBalance", "vLLM default"


class Policy(Protocol):
    """What every policy is measured through.

    Attributes:
        seconds: what the last plan took, without turning heat into what the policy takes.
    """

    seconds: float

    def plan(self, heat: np.ndarray, placement: np.ndarray) -> np.ndarray:
        """int[layers, ranks, slots] for heat [episodes, layers, experts] and today's placement."""


Make = Callable[[int, int, int], Policy]


class PeerError(RuntimeError):
    """A peer that cannot be fetched or imported."""


def peers() -> dict[str, Make]:
    """Makers by name: `make(ranks, slots_per_rank, ranks_per_node)` gives a fresh policy.

    Call `single_threaded` first, and each policy once on a shape before timing a fresh one: the
    reference compiles when it is first called.

    Raises:
        PeerError: a peer cannot be had; it says why.
    """
    flashlb, swift = _ascend_modules()
    default = _vllm_module()
    return {
        REFERENCE: lambda ranks, slots, near: _Reference(flashlb, ranks),
        SWIFT: lambda ranks, slots, near: _Swift(swift, near),
        VLLM: lambda ranks, slots, near: _VllmDefault(default, ranks),
    }


def single_threaded() -> None:
    """Keep numpy's BLAS, torch and numba to one thread in this process."""
    import numba
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    numba.set_num_threads(1)
    threadpool_limits(1)


def replica_loads(heat: np.ndarray, placement: np.ndarray) -> np.ndarray:
    """Tokens of each slot, int64[episodes, layers, ranks, slots], when replicas share evenly.

    Counts are whole; the first replicas take the remainder, so that they sum to the heat.
    """
    layers, ranks, slots = placement.shape
    flat = placement.reshape(layers, -1)
    episodes = len(heat)
    loads = np.empty((episodes, layers, ranks * slots), np.int64)
    for layer, experts in enumerate(flat):
        count = np.bincount(experts, minlength=heat.shape[2])
        order = np.argsort(experts, kind="stable")
        first = np.cumsum(count) - count
        turn = np.empty(len(experts), np.int64)
        turn[order] = np.arange(len(experts)) - first[experts[order]]
        tokens, replicas = heat[:, layer, experts].astype(np.int64), count[experts]
        loads[:, layer] = tokens // replicas + (turn < tokens % replicas)
    return loads.reshape(episodes, layers, ranks, slots)


class _Reference:
    def __init__(self, module: ModuleType, ranks: int) -> None:
        self._module, self._ranks = module, ranks
        self._policy = module.FlashLB()
        self.seconds = 0.0

    def plan(self, heat: np.ndarray, placement: np.ndarray) -> np.ndarray:
        import torch

        # it asks the group for its size and is stricter below 32 ranks
        group = SimpleNamespace(world_size=self._ranks)
        vars(self._module)["get_dynamic_eplb_group"] = lambda: group
        loads = torch.from_numpy(replica_loads(heat, placement))
        current = torch.from_numpy(placement.astype(np.int64))
        start = time.perf_counter()
        # the worker of vllm-ascend uses the placement as returned, whatever layers are named
        _, _, planned = self._policy.rebalance_experts(current, loads)
        self.seconds = time.perf_counter() - start
        return np.asarray(planned)


class _Swift:
    def __init__(self, module: ModuleType, ranks_per_node: int) -> None:
        import torch

        npu = SimpleNamespace(device_count=lambda: ranks_per_node)
        with patch.object(torch, "npu", npu, create=True):
            self._policy = module.SwiftBalanceEplb()
        self.seconds = 0.0

    def plan(self, heat: np.ndarray, placement: np.ndarray) -> np.ndarray:
        import torch

        totals = heat.sum(axis=0, keepdims=True)
        loads = torch.from_numpy(replica_loads(totals, placement)[0])
        current = torch.from_numpy(placement.astype(np.int64))
        start = time.perf_counter()
        _, _, planned = self._policy.rebalance_experts(current, loads)
        self.seconds = time.perf_counter() - start
        return np.array(planned)


class _VllmDefault:
    def __init__(self, module: ModuleType, ranks: int) -> None:
        self._policy, self._ranks = module.DefaultEplbPolicy, ranks
        self.seconds = 0.0

    def plan(self, heat: np.ndarray, placement: np.ndarray) -> np.ndarray:
        import torch

        totals = torch.from_numpy(heat.sum(axis=0))
        current = torch.from_numpy(placement.reshape(len(placement), -1).astype(np.int64))
        start = time.perf_counter()
        planned = self._policy.rebalance_experts(
            totals,
            current.shape[1],
            1,  # one group on one node: the global algorithm, which balances best
            1,
            self._ranks,
            current,
        )
        self.seconds = time.perf_counter() - start
        return planned.numpy().reshape(placement.shape)


def _ascend_modules() -> tuple[ModuleType, ModuleType]:
    folder = ascend_source() / "eplb" / "core" / "policy"
    with _stubs(), _package("eplb_peer_ascend", folder) as name:
        flashlb = importlib.import_module(f"{name}.policy_flashlb")
        return flashlb, importlib.import_module(f"{name}.policy_swift_balancer")


def _vllm_module() -> ModuleType:
    # found without importing vllm, which would start its plug-ins
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise PeerError("vLLM's default policy: vllm is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "distributed" / "eplb" / "policy"
    with _package("eplb_peer_vllm", folder) as name:
        return importlib.import_module(f"{name}.default")


@contextmanager
def _package(name: str, folder: Path) -> Iterator[str]:
    """Make the modules in `folder` importable under `name`, leaving out the real parents.

    The package stays in sys.modules: numba looks there for what it has cached.
    """
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = package
    try:
        yield name
    except ImportError as error:
        raise PeerError(f"the policies in {folder.name} do not import: {error}") from error


@contextmanager
def _stubs() -> Iterator[None]:
    """Stand-ins for what the policies of vLLM-Ascend import and do not need to plan."""
    contents: dict[str, dict[str, object]] = {
        "vllm": {},
        "vllm.logger": {"logger": logging.getLogger("eplb_peer_ascend")},
        "vllm_ascend": {},
        "vllm_ascend.distributed": {},
        "vllm_ascend.distributed.parallel_state": {"get_dynamic_eplb_group": None},
        "torch_npu": {},
    }
    modules = {}
    for name, names in contents.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(names)
    with patch.dict(sys.modules, modules):
        yield
        keep = {name: m for name, m in sys.modules.items() if name not in modules}
    sys.modules.update(keep)


def ascend_source() -> Path:
    """The folder of vllm-ascend's package, fetched by pip if need be.

    Raises:
        PeerError: it cannot be fetched.
    """
    script = FOLDER.parents[1] / "scripts" / "ascend_source.py"
    command = [sys.executable, str(script), ASCEND, str(FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeerError(done.stderr.strip())
    return Path(done.stdout.strip()) / "vllm_ascend"
