"""Tensors of a layer that belong to its experts and would stay behind when experts move.

vLLM hands out a layer's parameters (`get_expert_weights`). A quantisation method or a kernel may
keep others beside them, per expert too: scales folded at load, weights in another layout. If the
experts moved without them, tokens would be wrong and nothing would say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..loaders.staging import Stack
from .ranges import Ranges

SHARED = {
    "e_score_correction_bias",
    "w13_input_scale",
    "w2_input_scale",
    "hash_indices_table",
    "expert_local_to_global",
}
"""Names by which vLLM's layers hold what is equal for all of a rank's experts."""

_DEEPEST = 6  # from a layer to the tensors of its kernel's quantisation config


def left_behind(layer: Any, moved: Sequence[Stack], slots: int) -> str:
    """Name of the first tensor of `layer` that has a row per slot and is not moved; "" if none.

    Args:
        layer: vLLM's layer of routed experts.
        moved: what is moved, row by row; what lies beside a row in the same storage is not.
        slots: experts on a rank.
    """
    rows = Ranges(row for stack in moved for row in stack)
    for name, tensor in _tensors(layer, "", {id(layer)}, _DEEPEST):
        if (
            tensor.dim() > 0
            and tensor.shape[0] == slots
            and tensor.stride(0) != 0
            and name.rpartition(".")[2] not in SHARED
            and not rows.hold(tensor)
            and not _are_rows_equal(tensor)
        ):
            return name
    return ""


def _are_rows_equal(tensor: torch.Tensor) -> bool:
    """Whether it tells the same of each expert, as strides, limits and dummy scales do."""
    return len(tensor) > 1 and bool((tensor == tensor[:1]).all())


def _tensors(
    owner: Any, path: str, seen: set[int], depth: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all tensors in `owner` and in the parts of vLLM it is made of."""
    for name, value in _attributes(owner):
        where = f"{path}.{name}" if path else name
        if isinstance(value, torch.Tensor):
            yield where, value
        elif depth and id(value) not in seen and _is_a_part(value):
            seen.add(id(value))
            yield from _tensors(value, where, seen, depth - 1)


def _attributes(owner: Any) -> list[tuple[str, Any]]:
    if isinstance(owner, Mapping):
        return [(str(name), value) for name, value in owner.items()]
    if isinstance(owner, (list, tuple)):
        return [(str(number), value) for number, value in enumerate(owner)]
    slots = [name for kind in type(owner).__mro__ for name in getattr(kind, "__slots__", ())]
    found = {name: getattr(owner, name) for name in slots if hasattr(owner, name)}
    found.update(getattr(owner, "__dict__", {}))
    for registry in ("_parameters", "_buffers", "_modules"):  # of a torch.nn.Module
        found.update(found.pop(registry, None) or {})
    return list(found.items())


def _is_a_part(value: Any) -> bool:
    """Whether to look into it: containers, modules and what vLLM or its plug-ins define."""
    if isinstance(value, type) or (callable(value) and not hasattr(value, "__dict__")):
        return False
    if isinstance(value, (Mapping, list, tuple, torch.nn.Module)):
        return True
    return type(value).__module__.partition(".")[0] in ("vllm", "vllm_ascend", "compressed_tensors")
