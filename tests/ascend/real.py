"""vLLM-Ascend's own modules in this process, where nothing of an NPU is there."""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.distributed as dist

ABSENT = ("torch_npu", "vllm_ascend._build_info", "acl", "mooncake", "mooncake.engine")
"""Modules that its own tests, too, replace where there is no NPU."""

POLICIES = "vllm_ascend.eplb.core.policy.policy_factory"
"""Its policies, which need scipy; nobody asks them here."""


def load(root: str, version: str, names: dict[str, str]) -> SimpleNamespace:
    """The modules `names` (name by key) of the sources under `root`, as vLLM `version` has them."""
    os.environ["VLLM_VERSION"] = version.partition("rc")[0]
    for name in (*ABSENT, POLICIES):
        sys.modules[name] = MagicMock(spec=None)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    torch.npu = MagicMock()  # type: ignore[attr-defined]
    torch.Tensor.npu = lambda self, *_, **__: self  # type: ignore[attr-defined]
    sys.path.insert(0, root)
    return SimpleNamespace(
        **{key: importlib.import_module(f"vllm_ascend.{name}") for key, name in names.items()}
    )


def fork(ranks: int, folder: str) -> int:
    """Become `ranks` processes, what was imported being there already; returns the rank.

    Each writes to FOLDER/rankN.log. The first process waits for them and ends.
    """
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            log = os.open(f"{folder}/rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            return rank
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    sys.exit(any(codes))


def join(rank: int, ranks: int, folder: str) -> Any:
    """This process as a rank of a gloo group, as vLLM's coordinator of its EP group."""
    from vllm.distributed import parallel_state

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    parallel_state._PP = SimpleNamespace(rank_in_group=0, is_last_rank=True, world_size=1)
    parallel_state._TP = SimpleNamespace(rank_in_group=0, world_size=1)
    everyone = [list(range(ranks))]
    return parallel_state.init_model_parallel_group(
        everyone, rank, "gloo", group_name="ep", use_device_communicator=False
    )


def module(name: str, **contents: Any) -> ModuleType:
    """A module that stands in for one which needs an NPU."""
    made = ModuleType(name)
    vars(made).update(contents)
    sys.modules[name] = made
    return made
