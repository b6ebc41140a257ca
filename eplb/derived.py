"""Tensors of a layer that belong to its experts and would stay behind when experts move.

vLLM hands out a layer's parameters (`get_expert_weights`). A quantisation method or a kernel may
keep others beside them, per expert too: scales folded at load, weights in another layout. If the
experts moved without them, tokens would be wrong and nothing would say so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
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

_LIBRARIES = ("vllm", "vllm_ascend", "compressed_tensors", "triton_kernels")

_DEEPEST = 6  # from a layer to the tensors of its kernel's quantisation config


def left_behind(layer: Any, moved: Sequence[Stack], slots: int) -> str:
    """Name of the first tensor of `layer` that has a row per slot and is not moved; "" if none.

    A list of one tensor, or one float, per slot is such a tensor, too.

    Args:
        layer: vLLM's layer of routed experts.
        moved: what is moved, row by row; what lies beside a row in the same storage is not.
        slots: experts on a rank.
    """
    rows = Ranges(row for stack in moved for row in stack)
    for name, stack in _stacks(layer, slots):
        if isinstance(stack, list):
            stays = all(rows.hold(row) for row in stack) or _are_alike(stack)
        else:
            shared = stack.stride(0) == 0 or name.rpartition(".")[2] in SHARED
            stays = shared or rows.hold(stack) or _are_rows_equal(stack)
        if not stays:
            return name
    return ""


def _are_rows_equal(tensor: torch.Tensor) -> bool:
    """Whether it tells the same of each expert, as strides, limits and dummy scales do."""
    return len(tensor) > 1 and bool((tensor == tensor[:1]).all())


def _are_alike(tensors: list[torch.Tensor]) -> bool:
    return len(tensors) > 1 and all(torch.equal(tensor, tensors[0]) for tensor in tensors)


def _stacks(layer: Any, slots: int) -> Iterator[tuple[str, torch.Tensor | list[torch.Tensor]]]:
    """(name, stack) of all that has a row for each of `slots` in `layer` and in its parts."""
    seen, waiting = {id(layer)}, deque([("", layer, _DEEPEST)])
    while waiting:  # a part is looked into from the shortest way to it: as deep as can be
        path, owner, depth = waiting.popleft()
        for name, value in _attributes(owner):
            where = f"{path}.{name}" if path else name
            if (stack := _stack(value, slots)) is not None:
                yield where, stack
            elif depth and id(value) not in seen and _is_a_part(value):
                seen.add(id(value))
                waiting.append((where, value, depth - 1))


def _stack(value: Any, slots: int) -> torch.Tensor | list[torch.Tensor] | None:
    """`value` if it has a row for each of `slots`, else None.

    Numbers that are not floats are sizes as often as anything, and say nothing of an expert.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        value = torch.from_numpy(np.array(value))
    if isinstance(value, torch.Tensor):
        return value if value.dim() > 0 and len(value) == slots else None
    if not isinstance(value, (list, tuple)) or len(value) != slots:
        return None
    if all(isinstance(number, float) for number in value):
        return torch.tensor(value)
    if not all(isinstance(tensor, torch.Tensor) for tensor in value):
        return None
    are_like = all(tensor.shape == value[0].shape for tensor in value) and value[0].dim() > 0
    return list(value) if are_like else None


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
    if isinstance(value, (type, torch.Tensor)) or (
        callable(value) and not hasattr(value, "__dict__")
    ):
        return False
    if isinstance(value, (Mapping, list, tuple, torch.nn.Module)):
        return True
    return type(value).__module__.partition(".")[0] in _LIBRARIES
