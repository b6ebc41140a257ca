"""iceoryx2's Python binding as a peer: publish and subscribe to slices of bytes."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from .ipc_ends import Reader, Size, Writer, no_record

if TYPE_CHECKING:
    from .ipc_run import Run


class Iceoryx2Writer(Writer):
    """Publishes bytes; the oldest record makes room, as in ours."""

    def __init__(self, run: Run, size: Size):
        self._node, service = _service(run, size)
        builder = service.publisher_builder().initial_max_slice_len(size.nbytes)
        self._publisher = builder.create()
        self._nbytes = size.nbytes
        self._counts, self._source = np.empty(0), 0

    def write(self, counts: np.ndarray) -> None:
        if counts is not self._counts:
            self._counts, self._source = counts, counts.ctypes.data
        sample = self._publisher.loan_slice_uninit(self._nbytes)
        ctypes.memmove(sample.payload_ptr, self._source, self._nbytes)
        sample.assume_init().send()

    def close(self) -> None:
        del self._publisher, self._node


class Iceoryx2Reader(Reader):
    pause = 0.0005

    def __init__(self, run: Run, size: Size, handle: Any):
        self._node, service = _service(run, size)
        self._subscriber = service.subscriber_builder().create()
        self._shape = (1, *size.shape)
        self._none = no_record(size)

    def take(self) -> np.ndarray:
        sample = self._subscriber.receive()
        if sample is None:
            return self._none
        view = np.frombuffer(sample.payload().as_memory_view(), np.int32)
        return view.reshape(self._shape).copy()

    def close(self) -> None:
        del self._subscriber, self._node


def _service(run: Run, size: Size) -> tuple[Any, Any]:
    import iceoryx2 as iox

    iox.set_log_level(iox.LogLevel.Error)
    config = iox.config.default()
    config.global_cfg.prefix = iox.FileName.new(f"{run.prefix}-iox-")
    config.global_cfg.root_path = iox.Path.new(f"{run.folder}/iceoryx2")
    builder = iox.NodeBuilder.new().config(config)
    builder = builder.signal_handling_mode(iox.SignalHandlingMode.Disabled)
    node = builder.create(iox.ServiceType.Ipc)
    name = iox.ServiceName.new(f"heat-{size.nbytes}")
    service = node.service_builder(name).publish_subscribe(iox.Slice[ctypes.c_uint8])
    return node, service.subscriber_max_buffer_size(size.slots).open_or_create()
