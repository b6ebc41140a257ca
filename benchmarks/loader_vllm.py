"""vLLM's synchronous rearrangement, on the CPU: the whole call holds the main thread up."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import torch
from vllm.distributed.eplb.eplb_communicator import (
    TorchDistGlooStagedEplbCommunicator,
    TorchDistNcclEplbCommunicator,
)
from vllm.distributed.eplb.rebalance_execute import rearrange_expert_weights_inplace

from .loader_rank import Rank, Sample

STAGED, DIRECT = "vLLM torch_gloo", "vLLM torch_nccl"
STEPS_BEFORE = 3


class _Counting:
    """Counts what a communicator receives; mixed into one of vLLM's."""

    received = received_now = most_received = 0

    def add_recv(self, tensors: list[torch.Tensor], *args: Any, **kwargs: Any) -> None:
        nbytes = sum(tensor.nbytes for tensor in tensors)
        self.received += nbytes
        self.received_now += nbytes
        super().add_recv(tensors, *args, **kwargs)  # type: ignore[misc]

    def execute(self) -> None:
        self.most_received = max(self.most_received, self.received_now)
        self.received_now = 0
        super().execute()  # type: ignore[misc]


class _Staged(_Counting, TorchDistGlooStagedEplbCommunicator):
    """What vLLM chooses by itself here: receives into tensors of its own and copies them."""


class _Direct(_Counting, TorchDistNcclEplbCommunicator):
    """What it also takes for CPU tensors: isend and irecv of the tensors themselves."""


class VllmSync:
    """One rank's weights, buffer and communicator."""

    def __init__(self, rank: Rank, staged: bool):
        if not torch.accelerator.is_available():
            # the staged communicator waits for the device that the weights came from
            stream = SimpleNamespace(synchronize=lambda: None)
            torch.accelerator.current_stream = lambda *_: stream  # type: ignore[assignment]
        self._rank = rank
        self.weights = rank.new_weights()
        self._buffer = [torch.empty_like(tensor) for tensor in self.weights[0]]
        self._group = rank.new_group()
        self._staged = staged
        self._communicator: Any = (_Staged if staged else _Direct)(self._group)

    @property
    def staging(self) -> int:
        """A layer's buffer, and what the staged communicator allocates beside it."""
        buffer = sum(tensor.nbytes for tensor in self._buffer)
        return buffer + (self._communicator.most_received if self._staged else 0)

    def move(self, number: int) -> Sample:
        """The call, when all ranks have come to it."""
        plan = self._rank.scenario.plans[number]
        layers = len(plan.before)
        before = torch.from_numpy(plan.before.reshape(layers, -1).astype("int64"))
        after = torch.from_numpy(plan.placement.reshape(layers, -1).astype("int64"))
        received = self._communicator.received
        self._rank.rest(STEPS_BEFORE)
        began = time.monotonic_ns()
        rearrange_expert_weights_inplace(
            before, after, self.weights, self._buffer, self._group, self._communicator
        )
        took = (time.monotonic_ns() - began) / 1e3
        return Sample(took, took, took, received=self._communicator.received - received)
