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

from ..loaders.staging import Stack, plain_bytes
from .ranges import Ranges

SHARED = {"e_score_correction_bias", "hash_indices_table", "expert_local_to_global"}
"""Names by which vLLM's layers hold what says nothing of an expert's weights."""

_OF_A_PASS = {"prepare_finalize"}
"""Names of parts that keep what a pass has sent (DeepEP's handles: row by expert), no weights."""

_LIBRARIES = ("vllm", "vllm_ascend", "compressed_tensors", "triton_kernels")

_DEEPEST = 6  # from a layer to the tensors of its kernel's quantisation config

_FEWEST = 16  # elements of an expert's tensor by whose number a copy of all of them is known


def left_behind(layer: Any, moved: Sequence[Stack], slots: int) -> str:
    """Name of the first tensor of `layer` that has a part per slot and is not moved; "" if none.

    That is a row, or one of a list of tensors or floats; or it has the type and the number of
    elements of a stack that is moved, so that it is a copy of it in another order. Scales that all
    experts of the rank share are `shared_scales`.

    Args:
        layer: vLLM's layer of routed experts.
        moved: what is moved, row by row; what lies beside a row in the same storage is not.
        slots: experts on a rank.
    """
    rows = Ranges(row for stack in moved for row in stack)
    sizes = {_size(stack) for stack in moved if stack[0].numel() >= _FEWEST}
    for name, value in _values(layer, slots):
        stack = _stack(value, slots)
        if isinstance(stack, list):
            stays = all(rows.hold(row) for row in stack) or _are_alike(stack)
        elif stack is not None:
            shared = stack.stride(0) == 0 or _leaf(name) in SHARED
            alone = stack.numel() == 1 and _is_scale(name, stack)  # of a rank of one slot
            stays = shared or alone or rows.hold(stack) or _are_rows_equal(stack)
        else:
            is_copy = isinstance(value, torch.Tensor) and _size(value) in sizes
            stays = not is_copy or "shared" in name or rows.hold(value)
        if not stays:
            return name
    return ""


def shared_scales(layer: Any, moved: Sequence[Stack], slots: int) -> dict[str, float]:
    """Scales of `layer`, by name, that its experts share and that do not move with them.

    Arguments: see `left_behind`, which has found nothing.
    """
    rows = Ranges(row for stack in moved for row in stack)
    return {
        name: float(value.flatten()[0])
        for name, value in _values(layer, slots)
        if isinstance(value, torch.Tensor)
        and _is_scale(name, value)
        and (value.numel() == 1 or value.numel() == len(value) == slots)
        and not rows.hold(value)
    }


def _is_scale(name: str, tensor: torch.Tensor) -> bool:
    """Whether it is one, and not of shared experts, which a rank may hold a part of."""
    return "scale" in _leaf(name) and "shared" not in name and tensor.is_floating_point()


def _size(stack: Stack) -> tuple[torch.dtype, int]:
    """Its type and its number of elements."""
    if isinstance(stack, torch.Tensor):
        return stack.dtype, stack.numel()
    return stack[0].dtype, sum(tensor.numel() for tensor in stack)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _are_rows_equal(tensor: torch.Tensor) -> bool:
    """Whether it tells the same of each expert, as strides, limits and dummy scales do."""
    if len(tensor) < 2:
        return False
    rows = _bytes(tensor).view(len(tensor), tensor[0].nbytes)
    return bool((rows == rows[:1]).all())


def _are_alike(tensors: list[torch.Tensor]) -> bool:
    first, *others = map(_bytes, tensors)
    return bool(others) and all(torch.equal(other, first) for other in others)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes in the order of its elements: not all types (float8, int4) can be compared."""
    return plain_bytes(tensor.contiguous())


def _values(layer: Any, slots: int) -> Iterator[tuple[str, Any]]:
    """(name, value) of all that `layer` and its parts hold."""
    seen, waiting = {id(layer)}, deque([("", layer, _DEEPEST)])
    while waiting:  # a part is looked into from the shortest way to it: as deep as can be
        path, owner, depth = waiting.popleft()
        for name, value in _attributes(owner):
            where = f"{path}.{name}" if path else name
            yield where, value
            is_new = depth and id(value) not in seen and name not in _OF_A_PASS
            if is_new and _is_a_part(value) and _stack(value, slots) is None:
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
