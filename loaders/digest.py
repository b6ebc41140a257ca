"""The digest of an expert: 63 bits over the bytes of all its tensors, at memory speed.

On the CPU it is XXH3 (xxhash). On a device it is computed there, so that 8 bytes come to the host
and not the expert: a weighted sum of the 32-bit words, modulo 2**64. The weights are odd, so no
change of one word goes unseen, and mixed from the words' places (splitmix64; Steele et al. 2014),
so that changes of several do not cancel, as when rows change places. The two ways give different
numbers; a group is of one kind of device.
"""

from __future__ import annotations

import numpy as np
import torch
import xxhash

from ..device import device_of
from .staging import Stack, plain_bytes, slot_views

_CHUNK = 1 << 20  # words that are summed up at once
_GOLDEN = 0x9E3779B97F4A7C15  # odd; 2**64 / golden ratio
_FOLD = _GOLDEN - (1 << 64)  # as a signed word
_weights: dict[torch.device, torch.Tensor] = {}


def row_digest(views: list[torch.Tensor]) -> int:
    """Digest of one expert, from 0 to 2**63 - 1.

    Args:
        views: its tensors, as `slot_views` gives them; where they are cut does not matter on the
            CPU, on a device it does.
    """
    if views[0].device.type != "cpu":
        return device_digest(views)
    state = xxhash.xxh3_64()
    for view in views:
        state.update(plain_bytes(view).numpy().data)
    return state.intdigest() >> 1


def device_digest(views: list[torch.Tensor]) -> int:
    """`row_digest` by torch's own operations, on any device; waits for it once, at the end."""
    total = torch.zeros((), dtype=torch.int64, device=views[0].device)
    device = device_of(views[0])
    for tensor in views:
        view = plain_bytes(device.plain(tensor))
        for chunk in _words(view).split(_CHUNK):
            weights = _weights_on(view.device)[: chunk.numel()]
            total = total * _FOLD + (chunk.to(torch.int64) * weights).sum() + view.numel()
    return int(total) & (2**63 - 1)


def digests(weights: list[list[Stack]]) -> list[list[int]]:
    """[layers][slots] digests of all experts of a rank."""
    return [
        [row_digest(slot_views(layer, slot)) for slot in range(len(layer[0]))] for layer in weights
    ]


def _words(view: torch.Tensor) -> torch.Tensor:
    """The bytes as int32, the last word filled up with zeros."""
    if view.numel() % 4 or view.storage_offset() % 4:
        padded = view.new_zeros((view.numel() + 3) // 4 * 4)
        padded[: view.numel()] = view
        view = padded
    return view.view(torch.int32)


def _weights_on(device: torch.device) -> torch.Tensor:
    """int64[_CHUNK], odd."""
    if device not in _weights:
        words = np.arange(1, _CHUNK + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        words ^= words >> np.uint64(31)
        _weights[device] = torch.from_numpy((words | np.uint64(1)).view(np.int64)).to(device)
    return _weights[device]
