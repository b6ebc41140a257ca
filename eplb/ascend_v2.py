"""vLLM-Ascend's model runner V2: its `AscendEplbState` derives from vLLM's state, and so does ours.

vLLM's `__new__`, which we have replaced, is the derived class's too.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import balanced
from .ascend import WORKER, unsupported_group
from .runners import follow_runner_v2, follow_warm_up
from .support import unsupported_model, unsupported_use

if TYPE_CHECKING:
    from ..loaders.ascend_engine import AscendV2Engine

STATE = "vllm_ascend.distributed.eplb.eplb_state"
ROUTING = "vllm_ascend.ops.fused_moe.eplb"
RUNNER = "vllm_ascend.worker.v2.model_runner"
BUILD_TABLE = "build_expert_replica_routing_table"
ROUTING_TABLE = "expert_replica_routing_table"


def is_state(cls: type) -> bool:
    """Whether `cls` is the state of vLLM-Ascend's runner V2."""
    return cls.__module__ == STATE


def reason(parallel_config: Any = None, *args: Any, **kwargs: Any) -> str:
    """Why a state of these arguments is not to be ours; "" if it is."""
    if parallel_config is None:
        return "AscendEplbState is built in an unknown way by this version of vLLM-Ascend"
    if not callable(getattr(sys.modules.get(ROUTING), BUILD_TABLE, None)):
        return f"this version of vLLM-Ascend has no {ROUTING}.{BUILD_TABLE}"
    from vllm.config import get_current_vllm_config_or_none

    use = unsupported_use(get_current_vllm_config_or_none())
    return unsupported_group(parallel_config, use=use)


def unrouted(states: list[Any]) -> str:
    """Which layer of `EplbModelState`s does not route by the table that we write; "" if all do."""
    for state in states:
        for number, layer in enumerate(state.model.moe_layers):
            table = getattr(getattr(layer, "eplb_state", None), ROUTING_TABLE, None)
            if table is None:
                return (
                    f"{state.model_name}: MoE layer {number} has no {ROUTING_TABLE}, so this "
                    "version of vLLM-Ascend routes in another way"
                )
    return ""


class AscendState:
    """What our state does otherwise on Ascend."""

    uses_custom_load_stats = False
    """Else its controller would let its policy decide which steps are counted."""

    def _unsupported(self, states: list[Any], ranks: int) -> str:
        return unsupported_model(states, ranks) or unrouted(states)

    def _make_engine(self, states: list[Any], coordinator: Any) -> AscendV2Engine:
        from ..loaders.ascend_engine import AscendV2Engine

        build = getattr(sys.modules[ROUTING], BUILD_TABLE)
        return AscendV2Engine(states, coordinator.world_size, coordinator.rank_in_group, build)


@functools.cache
def state_class(base: Any) -> type:
    """Our state on Ascend, over vLLM-Ascend's `base`."""
    from .vllm_state import FlashState

    return type(f"Flash{base.__name__}", (AscendState, FlashState, base), {})


def follow(settle: Callable[[Any], None]) -> None:
    """Hook the runner and the worker; `settle` is called with the runner before dummy passes."""
    if module := sys.modules.get(RUNNER):
        follow_runner_v2(module.NPUModelRunner, settle)
    if module := sys.modules.get(WORKER):
        balanced.follow_worker(module.NPUWorker)
        follow_warm_up(module.NPUWorker)
