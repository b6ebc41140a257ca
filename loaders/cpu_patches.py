"""Four patches that let vLLM's CPU build run expert parallelism with EPLB.

They have a switch of their own (`EPLB_CPU_PATCHES=1`) so that a server without the balancer can
run with them too: that server is the baseline of every comparison. vLLM's GPU builds need none.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

_HASH_MULTIPLIER = 2654435769  # floor(2**32 / golden ratio), as in vLLM's own kernel


class _EplbCapablePlatform:
    """vLLM's current platform, but one that `ParallelConfig` accepts for EPLB."""

    def __init__(self, platform: Any):
        self._platform = platform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)

    def is_cuda_alike(self) -> bool:
        """True: the only question `ParallelConfig` asks here is whether EPLB may be enabled."""
        return True


def map_to_physical_and_record(
    topk_ids: torch.Tensor,
    expert_load_view: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    record_enabled: torch.Tensor,
    num_unpadded_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Route each (token, expert) to one replica and count it, as vLLM's Triton kernel does.

    Args:
        topk_ids: [tokens, top_k] logical expert ids.
        expert_load_view: int32 [physical experts], counted in place.
        logical_to_physical_map: int64 [experts, columns].
        logical_replica_count: int64 [experts].
        record_enabled: bool scalar.
        num_unpadded_tokens: scalar; rows from there on are padding and not counted.

    Returns:
        Physical expert ids, shape and dtype of `topk_ids`.
    """
    tokens = topk_ids.shape[0]
    logical = topk_ids.long()
    rows = torch.arange(tokens, device=topk_ids.device).unsqueeze(1)
    hashed = (rows * _HASH_MULTIPLIER) & 0xFFFFFFFF
    column = hashed % logical_replica_count[logical].clamp_min(1)
    physical = logical_to_physical_map[logical, column]
    counted = record_enabled.to(torch.int32).expand(physical.shape)
    if num_unpadded_tokens is not None:
        counted = counted * (rows < num_unpadded_tokens)
    expert_load_view.index_add_(0, physical.flatten(), counted.flatten().to(torch.int32))
    return physical.to(topk_ids.dtype)


def _patch_platform_check() -> None:
    import vllm.config.parallel as parallel

    if not parallel.current_platform.is_cuda_alike():
        parallel.current_platform = _EplbCapablePlatform(parallel.current_platform)


def _patch_router() -> None:
    import vllm.model_executor.layers.fused_moe.router.base_router as base_router

    base_router.eplb_map_to_physical_and_record = map_to_physical_and_record


def _patch_experts() -> None:
    """Translate global to local expert ids; another rank's experts weigh nothing here."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    original = CPUUnquantizedExperts.apply

    def apply(self, output, hidden_states, w1, w2, topk_weights, topk_ids, *args, **kwargs):
        expert_map = kwargs.get("expert_map", args[2] if len(args) > 2 else None)
        if expert_map is not None:
            local = expert_map[topk_ids.long()]
            mine = local >= 0
            topk_weights = topk_weights * mine
            topk_ids = local.clamp_min(0).to(topk_ids.dtype)
        return original(
            self, output, hidden_states, w1, w2, topk_weights, topk_ids, *args, **kwargs
        )

    CPUUnquantizedExperts.apply = apply


def _patch_model_runner() -> None:
    """Let the CPU runner register its model with EPLB, as the GPU runner's loader does."""
    import vllm.v1.worker.cpu_model_runner as runner_module
    from vllm.distributed.eplb.eplb_state import EplbState
    from vllm.model_executor.models.interfaces import get_mixture_of_experts_model

    original = runner_module.CPUModelRunner.load_model

    def load_model(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self._moe_model = get_mixture_of_experts_model(self.model)
        if self.parallel_config.enable_eplb and self._moe_model is not None:
            self.eplb_state = EplbState(self.parallel_config, self.device)
            self.eplb_state.add_model(self._moe_model, self.model_config)

    runner_module.CPUModelRunner.load_model = load_model


def install() -> None:
    """Apply the patches once per process; a no-op where vLLM's platform is not the CPU."""
    if getattr(sys, "_flash_eplb_cpu_patches", False):
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    sys._flash_eplb_cpu_patches = True  # type: ignore[attr-defined]
    _patch_platform_check()
    _patch_router()
    _patch_experts()
    _patch_model_runner()
