"""What differs between the devices on which vLLM counts heat: pinned memory and events."""

from __future__ import annotations

from typing import Protocol

import torch


class Event(Protocol):
    """A mark in a device's stream, as `torch.cuda.Event` and `torch.npu.Event` are."""

    def record(self) -> None:
        """Put the mark behind all that was issued so far."""

    def query(self) -> bool:
        """Whether the device has come past the mark; never waits."""


class Device(Protocol):
    """A device as the collector uses it.

    Attributes:
        is_host: its tensors lie in the host's memory and are complete when a call returns.
    """

    is_host: bool

    def pinned(self, layers: int, columns: int) -> torch.Tensor:
        """int32[layers, columns] of host memory that the device can copy to by itself."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Issue a copy from the device to pinned memory; do not wait for it."""

    def event(self) -> Event:
        """A new event."""


class Host:
    """The CPU: nothing is ever on its way."""

    is_host = True

    def pinned(self, layers: int, columns: int) -> torch.Tensor:
        """See `Device`; memory need not be pinned here."""
        return torch.zeros((layers, columns), dtype=torch.int32)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `Device`; it is done when this returns."""
        target.copy_(source)

    def event(self) -> Event:
        """Never asked for: who copies at once has nothing to wait for."""
        raise NotImplementedError("copies on the host are complete when they return")


class Accelerator:
    """A device with streams: `kind` is "cuda" or "npu". Work goes to its current stream."""

    is_host = False

    def __init__(self, kind: str):
        self._module = getattr(torch, kind)

    def pinned(self, layers: int, columns: int) -> torch.Tensor:
        """See `Device`."""
        return torch.zeros((layers, columns), dtype=torch.int32, pin_memory=True)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `Device`."""
        target.copy_(source, non_blocking=True)

    def event(self) -> Event:
        """See `Device`."""
        return self._module.Event()


def device_of(tensor: torch.Tensor) -> Device:
    """The device that `tensor` lies on.

    Raises:
        ValueError: neither the CPU nor a CUDA device or an NPU.
    """
    kind = tensor.device.type
    if kind == "cpu":
        return Host()
    if kind not in ("cuda", "npu"):
        raise ValueError(f"heat lies on a {kind} device; cpu, cuda and npu are known")
    return Accelerator(kind)
