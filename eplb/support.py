"""What cannot be balanced, by name and with the reason: it is refused at the start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..loaders.staging import Stack, slot_views
from .derived import left_behind

LENDERS = {"modelexpress", "mx", "mx-source", "mx-target", "netloader"}
"""Load formats (of ModelExpress, of vLLM-Ascend) with which an engine serves its live weights."""


def unsupported_mode(
    parallel_config: Any,
    device_type: str,
    uses_runner_v2: bool,
    pools: bool = False,
    use: str = "",
) -> str:
    """Why a group of this configuration cannot be balanced; empty if it can.

    Known when vLLM builds its `EplbState`, before any model is registered.

    Args:
        parallel_config: vLLM's `ParallelConfig`.
        device_type: "cpu", "cuda", ...
        uses_runner_v2: whether vLLM's model runner V2 runs the model.
        pools: whether the model pools and does not generate.
        use: what `unsupported_use` says.
    """
    ranks = parallel_config.tensor_parallel_size * parallel_config.data_parallel_size
    if device_type not in ("cpu", "cuda"):
        return f"device {device_type!r}: this version balances vLLM on cpu and cuda devices only"
    if parallel_config.pipeline_parallel_size > 1:
        why = (
            "each stage is an EP group of its own, and a session serves one"
            if uses_runner_v2
            else "on model runner V1 stages before the last do not count steps"
        )
        return (
            f"pipeline parallelism (pipeline_parallel_size="
            f"{parallel_config.pipeline_parallel_size}): {why}"
        )
    if pools and not uses_runner_v2:
        return "a pooling model: model runner V1 does not step after its passes"
    if reason := unsupported_anywhere(parallel_config, use):
        return reason
    if (prefill := getattr(parallel_config, "prefill_context_parallel_size", 1)) > 1:
        return (
            f"prefill context parallelism (prefill_context_parallel_size={prefill}): what a rank "
            "counts then is not settled"
        )
    if ranks == 1:
        return "an EP group of one rank: there is nothing to balance"
    if parallel_config.data_parallel_size > 1 and parallel_config.tensor_parallel_size > 1:
        return (
            f"tensor parallelism within data parallelism (TP="
            f"{parallel_config.tensor_parallel_size}, DP={parallel_config.data_parallel_size}): "
            "what a rank counts then is not settled"
        )
    if parallel_config.data_parallel_size > 1 and parallel_config.all2all_backend == "naive":
        return "naive dispatch (all2all_backend=naive): it counts every token once per DP rank"
    return ""


def unsupported_anywhere(parallel_config: Any, use: str = "") -> str:
    """What of a configuration cannot be balanced, whatever vLLM runs on; empty if nothing."""
    if use:
        return use
    if getattr(parallel_config, "enable_elastic_ep", False):
        return "elastic expert parallelism (enable_elastic_ep): ranks come and go"
    if getattr(parallel_config, "enable_fault_tolerance", False):
        return (
            "fault tolerance (enable_fault_tolerance): a rank gives up a pass that others finish, "
            "and from then on the ranks do not count the same steps"
        )
    if getattr(parallel_config, "use_ubatching", False):
        return "dual batch overlap (enable_dbo or ubatch_size)"
    return ""


def unsupported_use(vllm_config: Any) -> str:
    """What an engine is to be used for that cannot be balanced; empty if nothing, or None."""
    model = getattr(vllm_config, "model_config", None)
    if getattr(model, "enable_sleep_mode", False):
        return "sleep mode (enable_sleep_mode): it takes the weights away while we look at them"
    if getattr(vllm_config, "lora_config", None) is not None:
        return (
            "LoRA (enable_lora): adapters of experts lie by slot and would stay behind when "
            "experts move; serve without adapters, or merge them into the weights"
        )
    return ""


def lent_weights(vllm_config: Any) -> str:
    """How other engines come to map or copy this one's weights as they lie, in a sentence; "" if
    they do not. They take each expert for the one of the start, so none may move."""
    speculative = getattr(vllm_config, "speculative_config", None)
    for load in (
        getattr(vllm_config, "load_config", None),
        getattr(speculative, "draft_load_config", None),
    ):
        name = getattr(load, "load_format", "")
        extra = getattr(load, "model_loader_extra_config", None)
        mode = extra.get("mode") if isinstance(extra, dict) else None
        if name == "ipc_cache" and mode != "copy":
            return (
                "load_format=ipc_cache: experts lie in the memory of vLLM's weight cache, where "
                "the next engine would find them moved; set --model-loader-extra-config "
                """'{"mode": "copy"}'"""
            )
        if name in LENDERS:
            return (
                f"load_format={name}: other engines copy this one's weights while it runs and "
                "would find experts moved; use another load format"
            )
    return ""


def unsupported_model(states: list[Any], ranks: int) -> str:
    """Why registered models (vLLM's `EplbModelState`s) cannot be balanced; empty if they can."""
    if not states:
        return "no mixture-of-experts model was registered"
    for state in states:
        physical = state.physical_to_logical_map.shape[1]
        experts = state.logical_replica_count.shape[1]
        if physical % ranks:
            return f"{physical} physical experts do not divide by {ranks} EP ranks"
        if physical // ranks > experts:
            return (
                f"{physical // ranks} slots on a rank for {experts} experts: a rank would hold "
                "an expert twice; lower num_redundant_experts"
            )
        for layer, tensors in enumerate(state.model.expert_weights):
            if not len(tensors):
                return f"{state.model_name}: vLLM hands out no expert tensor of layer {layer}"
            computes = state.physical_to_logical_map.device.type
            for tensor in tensors:
                if (lies := tensor[0].device.type) != computes:
                    return (
                        f"{state.model_name}: an expert tensor of layer {layer} lies on {lies} and "
                        f"is copied to {computes} in each pass (cpu_offload_gb, "
                        "offload_group_size): a pass under way would see it half written; keep "
                        "experts on their device"
                    )
                if len(tensor) != physical // ranks or not _travels(tensor):
                    return (
                        f"{state.model_name}: an expert tensor of layer {layer} has {len(tensor)} "
                        f"rows of shape {tuple(tensor[0].shape)} and stride {tensor[0].stride()}, "
                        f"which cannot be moved row by row ({physical // ranks} slots)"
                    )
        for number, layer in enumerate(getattr(state.model, "moe_layers", ())):
            if getattr(layer, "do_naive_dispatch_combine", False):
                return (
                    f"{state.model_name}: naive dispatch in MoE layer {number} (its kernel does "
                    "not dispatch by itself): it counts every token once per DP rank"
                )
            held = getattr(layer, "routed_experts", layer)
            for name, kind in _wrapped(held):
                return (
                    f"{state.model_name}: {name} of MoE layer {number} is a {kind}: the kernel "
                    "keeps weights in a way that cannot be moved; choose another MoE backend"
                )
            moved = state.model.expert_weights[number]
            if name := left_behind(held, moved, physical // ranks):
                return (
                    f"{state.model_name}: {name} of MoE layer {number} has a part for each expert "
                    "and vLLM does not hand it out: it would stay behind when experts move"
                )
    return ""


def divided_batch(states: list[Any]) -> str:
    """Which registered model lets each tensor-parallel rank run tokens of its own through the
    experts, in a sentence; "" if none. They are counted as copies of the first one's."""
    for state in states:
        for part in getattr(state.model, "modules", list)():
            layer = getattr(part, "moe_config", None)
            says = (
                getattr(part, "use_sequence_parallel", False),
                getattr(layer, "is_sequence_parallel", False),
            )
            if True in says:  # a method of such a name says nothing
                return (
                    f"{state.model_name}: sequence parallelism in {type(part).__name__} (each "
                    "tensor-parallel rank runs tokens of its own through the experts, as MegaMoE "
                    "backends ask for): what a rank counts then is not settled; use "
                    "data_parallel_size in place of tensor_parallel_size, or another MoE backend"
                )
    return ""


def _wrapped(layer: Any) -> Iterator[tuple[str, str]]:
    """(name, kind) of the weights of a layer that are objects of a kernel's library."""
    for name in ("w13_weight", "w2_weight"):
        value = getattr(layer, name, None)
        if value is not None and not isinstance(value, (torch.Tensor, list, tuple)):
            yield name, f"{type(value).__module__}.{type(value).__qualname__}"


def _travels(stack: Stack) -> bool:
    try:
        return bool(slot_views([stack], 0))
    except ValueError:
        return False
