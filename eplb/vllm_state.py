"""The hook in vLLM: our `EplbState`, and the reasons not to install it.

`EplbState.__new__` is replaced, so whoever imported the class earlier gets our subclass too.
Upstream keeps registering models and counting heat; we override the steps, and its own
`rearrange` never runs.

What needs numba is imported when a model is registered, not at the top: before a worker is built,
vLLM's CPU platform scans all modules and trips over llvmlite's (an object without `__dict__`).
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed.eplb.eplb_state import EplbState
from vllm.distributed.parallel_state import get_ep_group
from vllm.platforms import current_platform

from . import ascend, ascend_v2, balanced
from .config import Config
from .contract import V1, V2
from .group import Group, UnsupportedError
from .hooks import call_before
from .phases import phase_of, show_batches
from .probe import probe
from .runners import follow_runner_v2, follow_warm_up
from .support import (
    divided_batch,
    lent_weights,
    unsupported_mode,
    unsupported_model,
    unsupported_use,
)

if TYPE_CHECKING:
    from ..loaders.vllm_engine import VllmEngine
    from .worker import Worker

log = logging.getLogger("flash_eplb.worker")


class FlashState:
    """An EPLB state with the balancing done by us; stands before vLLM's class or a derived one."""

    config: Config
    model_states: Any
    parallel_config: Any
    worker: Worker | None = None
    inert = ""
    is_writing = False
    batch: Any = None
    in_dummy = warming = False
    _agreed = _waits = False
    _configs: tuple[Any, ...] = ()
    """Of the registered models; drafters register before the main model."""

    def add_model(self, model: Any, model_config: Any, *args: Any, **kwargs: Any) -> None:
        """Upstream's registration; its asynchronous worker is not used."""
        super().add_model(model, model_config, *args, **kwargs)  # type: ignore[misc]
        self.is_async = False
        self._configs = (*self._configs, model_config)
        try:
            from ..ipc.rank_segment import warmup

            warmup()  # no step shall wait for a compiler
        except Exception as error:
            log.exception("flash_eplb cannot run in this process")
            self.inert = f"{type(error).__name__}: {error}"

    def prepare_forward(
        self, model_config: Any, num_unpadded_tokens: int, *args: Any, **kwargs: Any
    ) -> None:
        """Upstream's, and the main model's forward passes are counted."""
        *drafters, main = self._configs or (model_config,)
        is_main = not any(model_config is drafter for drafter in drafters)
        upstream = super().prepare_forward  # type: ignore[misc]
        # `update_config` gives the runner another object, by which upstream finds no state.
        upstream(main if is_main else model_config, num_unpadded_tokens, *args, **kwargs)
        if self.worker is None or self.in_dummy or self.warming:
            return
        if is_main:
            self.worker.forward(int(num_unpadded_tokens))

    def step(
        self, is_dummy: bool = False, is_profile: bool = False, *args: Any, **kwargs: Any
    ) -> None:
        """One step of ours instead of upstream's; profiling and warming up count nothing."""
        if is_profile or self.warming:
            return
        if self.worker is None and not self._agreed:
            self._start(is_dummy)
        if self.worker is not None:
            self.worker.step(is_dummy, phase_of(self.batch))

    def rearrange(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Never: the planner alone decides."""
        return None

    def _start(self, is_dummy: bool) -> None:
        """At the first step of all ranks at which none writes weights: what is asked of models is
        about those that they have."""
        if not balanced.is_any_writing(self, get_ep_group().cpu_group):
            self._make_worker(is_dummy)
        elif not self._waits:
            self._waits = True
            log.warning(
                "steps run while an update of the weights is open (start_weight_update) on some "
                "EP rank: nothing is balanced, and `eplb status` finds no engine, until it has "
                "ended (finish_weight_update) on all of them"
            )

    def _make_worker(self, is_dummy: bool) -> None:
        states = list(self.model_states.values())
        self._agreed = True
        worker = self._agreed_on(lambda: self._worker_of(states))
        if len(states) > 1 and not self.inert:  # all ranks ask this, or none: it is a collective
            whole = worker
            worker = self._agreed_on(lambda: self._without_unloaded(whole, states))
        if self.inert:
            log.error("flash_eplb does not balance: %s; vLLM serves on, unbalanced", self.inert)
            return
        self.worker = worker
        if worker is not None and not is_dummy:
            worker.forward(0)  # the pass that this first step ends

    def _agreed_on(self, make: Callable[[], Worker | None]) -> Worker | None:
        """What `make` gives, if it does so on all ranks; where it does not, `inert` says why."""
        worker, mine = None, self.inert
        try:
            worker = None if mine else make()
        except UnsupportedError as error:
            mine = str(error)
        except Exception as error:  # it is our question, and the engine serves on without us
            log.exception("flash_eplb does not fit the models of this rank")
            mine = f"{type(error).__name__}: {error}"
        self.inert = balanced.agree(get_ep_group().cpu_group, mine)
        return worker

    def _worker_of(self, states: list[Any]) -> Worker:
        from .scales import scales_of
        from .worker import Worker

        ranks = get_ep_group().world_size
        if reason := self._unsupported(states, ranks):
            raise UnsupportedError(reason)
        engine = self._make_engine(states, get_ep_group())
        unsupported = functools.partial(self._unsupported, states, ranks)
        scales = functools.partial(scales_of, states, ranks)
        experts = _experts(states)
        return Worker(
            self.config, self._group(), engine, engine.models, experts, unsupported, scales
        )

    def _group(self) -> Group:
        return balanced.group_of(get_ep_group(), self.parallel_config.tensor_parallel_size)

    def _without_unloaded(self, whole: Worker | None, states: list[Any]) -> Worker | None:
        """`whole`, which is of all `states`, or a worker of those that are `_loaded`."""
        loaded = self._loaded(states)
        return whole if len(loaded) == len(states) else self._worker_of(loaded)

    def _loaded(self, states: list[Any]) -> list[Any]:
        """Without the drafters whose replicas of experts differ; a collective of all ranks.

        vLLM gives some drafters (MTP of DeepSeek and GLM) slots for replicas, and loads nothing
        there. That is no reason to leave the main model unbalanced.
        """
        from .reference import take_reference

        loaded = []
        for drafter in states[:-1]:
            engine = self._make_engine([drafter], get_ep_group())
            try:
                take_reference(self._group(), engine, _experts(states))
            except UnsupportedError as error:
                log.warning(
                    "flash_eplb leaves the experts of %s where they are, and balances the main "
                    "model: %s. vLLM loads no redundant experts of some drafters, whose drafts are "
                    "worse for it; with num_redundant_experts=0 there are none",
                    drafter.model_name,
                    str(error).partition(" (")[0],
                )
            else:
                loaded.append(drafter)
        return [*loaded, states[-1]]

    def _unsupported(self, states: list[Any], ranks: int) -> str:
        return unsupported_model(states, ranks) or divided_batch(states)

    def _make_engine(self, states: list[Any], coordinator: Any) -> VllmEngine:
        from ..loaders.vllm_engine import VllmEngine

        return VllmEngine(states, coordinator.world_size)


def _experts(states: list[Any]) -> int:
    """Logical experts per layer, of all models alike."""
    return int(states[-1].logical_replica_count.shape[1])


class FlashEplbState(FlashState, EplbState):
    """vLLM's EPLB state with the balancing done by us."""


def _settle(runner: Any) -> None:
    """A dummy pass is about to run, of which `prepare_forward` tells nothing."""
    worker = getattr(getattr(runner, "eplb_state", None), "worker", None)
    if worker is not None:
        worker.settle()


def install(config: Config, is_ascend: bool = False) -> None:
    """Let every new `EplbState` be ours, unless its mode is not supported.

    Args:
        config: settings.
        is_ascend: whether vLLM-Ascend is there, whose runner V1 does without `EplbState`.

    Raises:
        RuntimeError: this vLLM's `EplbState` is not the one we know; upstream stays in charge.
    """
    _warn_of_what_does_nothing(config)
    missing = [
        name
        for name in ("add_model", "prepare_forward", "step", "rearrange")
        if not callable(getattr(EplbState, name, None))
    ]
    if missing and is_ascend:
        log.info(
            "vLLM's EplbState has no %s, so vLLM-Ascend is balanced on model runner V1 only",
            ", ".join(missing),
        )
        return
    if missing:
        raise RuntimeError(
            f"vLLM's EplbState has no {', '.join(missing)}: this version of vLLM is not known"
        )

    def new(cls: type[EplbState], *args: Any, **kwargs: Any) -> EplbState:
        is_ascend = ascend_v2.is_state(cls)
        if cls is not EplbState and not is_ascend:
            return object.__new__(cls)
        if reason := balanced.why_not(ascend_v2.reason if is_ascend else _reason, *args, **kwargs):
            log.error("flash_eplb does not balance: %s; vLLM serves on without it", reason)
            return object.__new__(cls)
        ours = ascend_v2.state_class(cls) if is_ascend else FlashEplbState  # type: ignore[arg-type]
        state: Any = object.__new__(ours)
        state.config = config
        state.inert = lent_weights(get_current_vllm_config_or_none())
        balanced.add(state)
        if is_ascend:
            ascend_v2.follow(_settle)
            return state
        if module := sys.modules.get("vllm.v1.worker.gpu_worker"):
            balanced.follow_worker(module.Worker)
            follow_warm_up(module.Worker)
        if module := sys.modules.get("vllm.v1.worker.gpu_model_runner"):
            show_batches(module.GPUModelRunner)
            call_before(module.GPUModelRunner, "_dummy_run", _settle)
        if module := sys.modules.get("vllm.v1.worker.gpu.model_runner"):
            follow_runner_v2(module.GPUModelRunner, _settle)
        return state

    EplbState.__new__ = staticmethod(new)  # type: ignore[assignment]


def _warn_of_what_does_nothing(config: Config) -> None:
    """Say so where vLLM is started without --enable-eplb, where we do nothing, or is to log what
    only its own step logs; and why its CPU build is about to refuse."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if current_platform.device_type == "cpu" and self.enable_eplb and not config.cpu_patches:
            log.warning(
                "vLLM's CPU build refuses --enable-eplb without our patches: set EPLB_CPU_PATCHES=1"
            )
        made = original(self, *args, **kwargs)
        if made.parallel_config.enable_eplb:
            theirs = getattr(made.parallel_config, "eplb_config", None)
            if getattr(theirs, "log_balancedness", False):
                log.warning(
                    "log_balancedness of --eplb-config logs nothing where flash_eplb balances, for "
                    "vLLM's own step does not run: the planner's log tells PAR, its inverse"
                )
            return made
        without = "vLLM runs without --enable-eplb"
        if current_platform.device_type == "npu" and not getattr(made, "use_v2_model_runner", 0):
            without = ascend.is_off(made)
        if without:
            log.warning("EPLB_ENABLED is set, but %s: nothing is balanced", without)
        return made

    EngineArgs.create_engine_config = create_engine_config  # type: ignore[method-assign]


def _reason(*args: Any, **kwargs: Any) -> str:
    parallel_config = kwargs.get("parallel_config", args[0] if args else None)
    device = kwargs.get("device", args[1] if len(args) > 1 else None)
    if parallel_config is None or device is None:
        return "EplbState is built in an unknown way by this version of vLLM"
    vllm_config = get_current_vllm_config_or_none()
    runner_v2 = vllm_config is not None and vllm_config.use_v2_model_runner
    model = getattr(vllm_config, "model_config", None)
    pools = getattr(model, "runner_type", "") == "pooling"
    use = unsupported_use(vllm_config)
    mode = unsupported_mode(parallel_config, device.type, runner_v2, pools, use)
    return mode or probe(V2 if runner_v2 else V1)
