"""What differs between the devices on which vLLM runs: pinned memory, events and side streams."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch


class Event(Protocol):
    """A mark in a device's stream, as `torch.cuda.Event` and `torch.npu.Event` are."""

    def record(self) -> None:
        """Put the mark behind all that was issued so far."""

    def query(self) -> bool:
        """Whether the device has come past the mark; never waits."""


class SideStream(Protocol):
    """A queue of work on a device, beside the one on which the engine computes."""

    def use(self) -> AbstractContextManager[Any]:
        """Within it, what this thread issues goes here."""

    def after(self, event: Event) -> None:
        """What follows here waits, on the device, for `event`."""

    def finish(self) -> None:
        """Wait until all that was issued here is done."""


class Device(Protocol):
    """A device as the collector and the stager use it.

    Attributes:
        is_host: its tensors lie in the host's memory and are complete when a call returns.
    """

    is_host: bool

    def pinned(self, layers: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeros [layers, columns] in host memory that the device can copy to by itself."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Issue a copy from the device to pinned memory; do not wait for it."""

    def event(self) -> Event:
        """A new event."""

    def side_stream(self) -> SideStream:
        """A new stream; called by the thread that will use it."""

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Memory for such a tensor, in the layout that `tensor` has on its device."""

    def plain(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, or a copy of it if its layout on the device is none of torch's."""


class Host:
    """The CPU: nothing is ever on its way."""

    is_host = True

    def pinned(self, layers: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """See `Device`; memory need not be pinned here."""
        return torch.zeros((layers, columns), dtype=dtype)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `Device`; it is done when this returns."""
        target.copy_(source)

    def event(self) -> Event:
        """Never asked for: who copies at once has nothing to wait for."""
        raise NotImplementedError("copies on the host are complete when they return")

    def side_stream(self) -> SideStream:
        """A thread is all that it takes."""
        return _HostStream()

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Device`."""
        return torch.empty_like(tensor)

    def plain(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Device`: all layouts here are torch's."""
        return tensor


class _HostStream:
    def use(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def after(self, event: Event) -> None:
        raise NotImplementedError("the host has no events")

    def finish(self) -> None:
        return


class Accelerator:
    """A device with streams, of torch's module `kind`. Work goes to its current stream."""

    is_host = False

    def __init__(self, kind: str, index: int | None = None):
        self._module = getattr(torch, kind)
        self._index = index

    def pinned(self, layers: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """See `Device`."""
        return torch.zeros((layers, columns), dtype=dtype, pin_memory=True)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `Device`."""
        target.copy_(source, non_blocking=True)

    def event(self) -> Event:
        """See `Device`."""
        return self._module.Event()

    def side_stream(self) -> SideStream:
        """See `Device`."""
        if self._index is not None:
            self._module.set_device(self._index)  # a thread begins with device 0
        return _Stream(self._module)

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Device`."""
        return torch.empty_like(tensor)

    def plain(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Device`: all layouts here are torch's."""
        return tensor


_ND = 2
"""The number by which CANN knows torch's own layout."""


class Npu(Accelerator):
    """An Ascend NPU: its tensors may lie in fractal layouts, which no view may cut."""

    def __init__(self, index: int | None = None):
        super().__init__("npu", index)
        import torch_npu  # type: ignore[import-not-found]

        self._npu = torch_npu

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Device`; torch.empty_like forgets the layout on some devices."""
        return self._npu.empty_with_format(
            size=tensor.size(),
            dtype=tensor.dtype,
            layout=tensor.layout,
            device=tensor.device,
            acl_format=int(self._npu.get_npu_format(tensor)),
        )

    def plain(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Device`."""
        if int(self._npu.get_npu_format(tensor)) == _ND:
            return tensor
        return self._npu.npu_format_cast(tensor, _ND)


class _Stream:
    def __init__(self, module: Any):
        self._module = module
        self._stream = module.Stream()

    def use(self) -> AbstractContextManager[Any]:
        return self._module.stream(self._stream)

    def after(self, event: Event) -> None:
        self._stream.wait_event(event)

    def finish(self) -> None:
        self._stream.synchronize()


def device_of(tensor: torch.Tensor) -> Device:
    """The device that `tensor` lies on.

    Raises:
        ValueError: neither the CPU nor a CUDA device or an NPU.
    """
    kind = tensor.device.type
    if kind == "cpu":
        return Host()
    if kind not in ("cuda", "npu"):
        raise ValueError(f"a tensor lies on a {kind} device; cpu, cuda and npu are known")
    return Npu(tensor.device.index) if kind == "npu" else Accelerator(kind, tensor.device.index)
