"""The hooks on model runner V2 and on the warm-up, by which vLLM's EPLB state knows what runs.

Model runner V1 prepares real passes only (`EplbState.prepare_forward`). V2 runs dummy passes by the
same method as real ones, so it prepares them too; and before vLLM 0.33 its warm-up steps like real
passes do, before CUDA graphs are captured, when no other thread may touch the device. The state is
told of both. So on either runner a real pass counts one preparation and one step, a dummy pass one
step only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .hooks import Method, call_before, wrap_once


def follow_runner_v2(runner_class: type, settle: Callable[[Any], None]) -> None:
    """Let model runner V2 show its batch (`state.batch`) before each real step, and set
    `state.in_dummy` while a dummy pass runs.

    Args:
        runner_class: `GPUModelRunner` of `vllm.v1.worker.gpu`.
        settle: called with the runner before a dummy pass.
    """

    def show(runner: Any) -> None:
        if runner.eplb_state is not None:
            runner.eplb_state.batch = getattr(runner.execute_model_state, "input_batch", None)

    call_before(runner_class, "sample_tokens", show)
    call_before(runner_class, "pool", show)

    def wrap(original: Method) -> Method:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            settle(self)
            with Flag(self.eplb_state, "in_dummy"):
                return original(self, *args, **kwargs)

        return method

    wrap_once(runner_class, "_dummy_run", wrap)


def follow_warm_up(worker_class: type) -> None:
    """Let a worker set `warming` of its runner's state, or of vLLM-Ascend's updator, while it warms
    up and captures graphs."""

    def wrap(original: Method) -> Method:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            with Flag(state_of(self.model_runner), "warming"):
                return original(self, *args, **kwargs)

        return method

    wrap_once(worker_class, "compile_or_warm_up_model", wrap)


def state_of(runner: Any) -> Any:
    """The EPLB state of a model runner, or vLLM-Ascend's updator; None if it has none."""
    return getattr(runner, "eplb_state", None) or getattr(runner, "eplb_updator", None)


class Flag:
    """Sets an attribute of `owner` for a while; `owner` may be None."""

    def __init__(self, owner: Any, name: str):
        self._owner = owner
        self._name = name

    def __enter__(self) -> None:
        self._was = getattr(self._owner, self._name, False)
        if self._owner is not None:
            setattr(self._owner, self._name, True)

    def __exit__(self, *_: object) -> None:
        if self._owner is not None:
            setattr(self._owner, self._name, self._was)
