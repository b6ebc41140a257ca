"""Expert maps: placements as JSON files of the form that vLLM-Ascend reads and writes.

`layer_list` has the MoE layers in the order in which the engine makes them, numbered from 0; dense
layers are not counted. `device_expert` has the logical expert of each slot of a rank.
See docs/planning.md.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from ..ipc.placement import PlacementError, check_placement
from .whole_file import write_whole

log = logging.getLogger("flash_eplb.planner")

_MOST_EXPERTS = 2**15 - 1


class MapError(ValueError):
    """A file that cannot be read or is no expert map; the text names it and the remedy."""


@dataclass(frozen=True, eq=False)
class ExpertMap:
    """A placement out of a file.

    Attributes:
        path: of the file.
        placement: int32 [layers, ranks, slots], the logical expert in each slot; valid.
    """

    path: str
    placement: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(layers, experts, ranks, slots)."""
        layers, ranks, slots = self.placement.shape
        return layers, int(self.placement.max()) + 1, ranks, slots


class _Device(msgspec.Struct):
    device_id: int
    device_expert: Annotated[list[Annotated[int, Meta(ge=0, lt=_MOST_EXPERTS)]], Meta(min_length=1)]


class _Layer(msgspec.Struct):
    layer_id: int
    device_count: int
    device_list: Annotated[list[_Device], Meta(min_length=1)]


class _File(msgspec.Struct):
    moe_layer_count: int
    layer_list: Annotated[list[_Layer], Meta(min_length=1)]


def read_map(path: str | Path) -> ExpertMap:
    """Read and check a file.

    Raises:
        MapError: it cannot be read; it is not of the form; layers or devices are not numbered from
            0 in their order; the ranks have different numbers of slots; an expert has no slot, or
            stands twice on a rank.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        text = f"the expert map {path} cannot be read: {error.strerror}; {_remedy(path)}"
        raise MapError(text) from None
    try:
        return ExpertMap(str(path), _placement(msgspec.json.decode(content, type=_File)))
    except (ValueError, RecursionError) as error:  # a msgspec or a placement error, or not UTF-8
        raise MapError(f"{path} is no expert map: {error}; {_remedy(path)}") from None


def encode_map(placement: np.ndarray) -> str:
    """The content of the file for a valid placement int [layers, ranks, slots].

    Raises:
        PlacementError: it is not valid.
    """
    check_placement(placement, int(placement.max()) + 1)
    layers = [
        _Layer(number, len(ranks), [_Device(rank, held) for rank, held in enumerate(ranks)])
        for number, ranks in enumerate(placement.tolist())
    ]
    encoded = msgspec.json.encode(_File(len(layers), layers))
    return msgspec.json.format(encoded, indent=1).decode() + "\n"


class SavedPlacement:
    """The file of EPLB_SAVE_PLACEMENT: the placement of an engine, after each plan.

    Args:
        path: of the file; "" saves nothing.
    """

    def __init__(self, path: str = ""):
        self._path = path
        self._failed = False

    def save(self, placement: np.ndarray) -> None:
        """Replace the file as a whole; says once if that fails, for it is of use to nobody now."""
        if not self._path:
            return
        try:
            write_whole(self._path, encode_map(placement))
        except OSError as error:
            if not self._failed:
                log.error(
                    "EPLB_SAVE_PLACEMENT=%s cannot be written: %s; balancing goes on without it",
                    self._path,
                    error.strerror,
                )
            self._failed = True
            return
        self._failed = False


def _remedy(path: str | Path) -> str:
    place = "map.json" if os.path.lexists(path) else path  # what is there may be the heat
    return f"write one with `eplb plan HEAT -o {place}`"


def _placement(file: _File) -> np.ndarray:
    trouble = next(_troubles(file), None)
    if trouble:
        raise PlacementError(trouble)
    rows = [[device.device_expert for device in layer.device_list] for layer in file.layer_list]
    placement = np.array(rows, np.int32)
    check_placement(placement, int(placement.max()) + 1)
    return placement


def _troubles(file: _File) -> Iterator[str]:
    """What keeps the file from being an array [layers, ranks, slots], in words."""
    layers = file.layer_list
    if file.moe_layer_count != len(layers):
        yield f"moe_layer_count is {file.moe_layer_count}, and layer_list has {len(layers)} layers"
    ranks, slots = len(layers[0].device_list), len(layers[0].device_list[0].device_expert)
    for number, layer in enumerate(layers):
        devices = layer.device_list
        if layer.layer_id != number:
            yield (
                f"layer_list[{number}] has layer_id {layer.layer_id}; MoE layers are numbered from "
                "0, in their order"
            )
        if len(devices) != ranks or layer.device_count != ranks:
            yield (
                f"layer {number} has device_count {layer.device_count} and {len(devices)} devices; "
                f"both must be {ranks}, the devices of layer 0"
            )
        for rank, device in enumerate(devices):
            if device.device_id != rank:
                yield (
                    f"layer {number}: device_list[{rank}] has device_id {device.device_id}; "
                    "devices are numbered from 0, in their order"
                )
            if len(device.device_expert) != slots:
                yield (
                    f"layer {number}: device {rank} has {len(device.device_expert)} experts, and "
                    f"device 0 of layer 0 has {slots}; all must have the same number"
                )
