"""The hooks in vLLM-Ascend: our updator in its model runner V1, our state in its runner V2.

Its modules cannot be imported before its worker has patched vLLM, so what hangs on them is hooked
when a worker is made: vLLM-Ascend's derives from vLLM's, whose beginning we follow.
"""

from __future__ import annotations

import functools
import logging
import sys
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from . import balanced
from .config import Config
from .hooks import Method, call_before, wrap_once
from .phases import phase_of
from .runners import Flag, follow_warm_up
from .support import lent_weights, unsupported_anywhere, unsupported_use

if TYPE_CHECKING:
    from .worker import Worker

log = logging.getLogger("flash_eplb.worker")

UPDATOR = "vllm_ascend.eplb.eplb_updator"
RUNNER = "vllm_ascend.worker.model_runner_v1"
WORKER = "vllm_ascend.worker.worker"

NEEDED = {
    "EplbUpdator": ("set_adaptor", "warm_up_eplb", "forward_before", "forward_end", "shutdown"),
    "VllmEplbAdaptor": ("init_expert_param_per_layer", "init_buffer_tensor"),
}
"""Methods without which the classes of `UPDATOR` are not those that we know."""

OF_LAYER = ("moe_load", "global_expert_map", "get_log2phy_map", "ep_rank")
BIASES = ("w13_bias", "w2_bias")
OF_ADAPTOR = (
    "moe_layers",
    "expert_param_per_layer",
    "expert_weight_key_per_layer",
    "buffer_tensor_list",
)


POOLING = "a pooling model: model runner V1 does not tell when its passes end"


class FlashUpdator:
    """vLLM-Ascend's `EplbUpdator` with the balancing done by us: see `updator_class`.

    The runner tells it of each pass (`follow_runner`), whether it is a dummy one.
    """

    config: Config
    worker: Worker | None = None
    in_dummy = warming = False
    tokens = 0
    batch: Any = None
    inert = ""
    is_writing = False

    def __init__(self, eplb_config: Any, loader: Any, eplb_process: Any, process: Any):
        super().__init__(eplb_config, loader, eplb_process, process)  # type: ignore[call-arg]
        self.shutdown()  # type: ignore[attr-defined]  # its planner process; ours is another
        if eplb_config.expert_map_record_path is not None:
            log.warning(
                "expert_map_record_path=%s does nothing with flash_eplb: set "
                "EPLB_SAVE_PLACEMENT for the planner",
                eplb_config.expert_map_record_path,
            )

    def warm_up_eplb(self) -> None:
        """Once the layers are there, on all ranks: agree to balance them, or not to."""
        coordinator = self.comm_group  # type: ignore[attr-defined]
        worker, reason = None, ""
        try:
            reason = self.inert or unsupported_layers(self.adaptor)  # type: ignore[attr-defined]
            worker = None if reason else self._worker_of(coordinator)
        except Exception as error:
            log.exception("flash_eplb does not fit the layers of this rank")
            reason = f"{type(error).__name__}: {error}"
        self.inert = balanced.agree(coordinator.cpu_group, reason)
        if self.inert:
            log.error(
                "flash_eplb does not balance: %s; vLLM-Ascend serves on, unbalanced", self.inert
            )
            return
        self.worker = worker

    def _worker_of(self, coordinator: Any) -> Worker:
        from vllm.distributed.parallel_state import get_tensor_model_parallel_world_size

        from ..ipc.rank_segment import warmup
        from ..loaders.ascend_engine import AscendEngine
        from .worker import Worker

        warmup()
        adaptor = self.adaptor  # type: ignore[attr-defined]
        engine = AscendEngine(adaptor, coordinator.rank_in_group)
        group = balanced.group_of(coordinator, get_tensor_model_parallel_world_size())
        models = [("model", len(adaptor.moe_layers))]
        experts = adaptor.moe_layers[0].global_expert_map.shape[1]
        return Worker(self.config, group, engine, models, experts)

    def forward_before(self) -> None:
        """A forward pass is about to run."""
        if self.worker is None or self.warming:
            return
        if self.in_dummy:
            self.worker.settle()
        else:
            self.worker.forward(self.tokens)

    def forward_end(self, eplb_heat_collection_status: bool = True) -> None:
        """The forward pass is over; where the layers have not counted, there is no heat."""
        if self.warming:
            return
        if self.worker is not None:
            self.worker.step(self.in_dummy, 0 if self.in_dummy else phase_of(self.batch))
        elif not self.inert:
            self.inert = "the model runner has not called eplb_warmup before its first pass"
            log.error("flash_eplb does not balance: %s", self.inert)


@functools.cache
def updator_class(base: Any) -> type:
    """Our updator, derived from vLLM-Ascend's `EplbUpdator`."""
    return type("FlashEplbUpdator", (FlashUpdator, base), {})


def install(config: Config) -> None:
    """Let vLLM-Ascend's model runner V1 be balanced by us, as soon as its worker is made."""
    from vllm.v1.worker.worker_base import WorkerBase

    def hook(worker: Any) -> None:
        try:
            hook_runner_v1(config)
        except Exception:  # a worker that is being made must not fail by us
            log.exception("flash_eplb does not fit this vLLM-Ascend, which serves on without it")

    call_before(WorkerBase, "__init__", hook)


def hook_runner_v1(config: Config) -> None:
    """Let every new `EplbUpdator` be ours, unless its mode is not supported; only once."""
    module = sys.modules.get(UPDATOR)
    if module is None or "__new__" in vars(module.EplbUpdator):
        return
    if missing := missing_names(module):
        log.error("flash_eplb does not balance: this vLLM-Ascend has no %s", ", ".join(missing))
        return

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        from vllm.config import get_current_vllm_config_or_none

        if reason := balanced.why_not(lambda: unsupported_group(*_configs())):
            log.error(
                "flash_eplb does not balance: %s; vLLM-Ascend's own balancer stays in charge",
                reason,
            )
            return object.__new__(cls)
        updator: Any = object.__new__(updator_class(cls))
        updator.config = config
        updator.inert = lent_weights(get_current_vllm_config_or_none())
        balanced.add(updator)
        return updator

    module.EplbUpdator.__new__ = staticmethod(new)
    if runner := sys.modules.get(RUNNER):
        follow_runner(runner.NPUModelRunner)
    if worker := sys.modules.get(WORKER):
        balanced.follow_worker(worker.NPUWorker)
        follow_warm_up(worker.NPUWorker)


def missing_names(module: Any) -> list[str]:
    """What the classes of `UPDATOR` lack of what we hook or read."""
    return [
        f"{name}.{method}"
        for name, methods in NEEDED.items()
        for method in methods
        if not callable(getattr(getattr(module, name, None), method, None))
    ]


def unsupported_group(
    parallel_config: Any, ascend_config: Any = None, pools: bool = False, use: str = ""
) -> str:
    """Why a group of vLLM-Ascend's cannot be balanced, whatever its layers; "" if it can.

    Args:
        parallel_config: vLLM's; None if it is not known here.
        ascend_config: vLLM-Ascend's; None if it is not known here.
        pools: whether the model pools and does not generate, on model runner V1.
        use: what `unsupported_use` says.
    """
    if pools:
        return POOLING
    if getattr(ascend_config, "mix_placement", False):
        return (
            "mix_placement: shared experts stand among the routed ones, each on the rank that "
            "uses it"
        )
    if parallel_config is None:
        return ""
    if parallel_config.pipeline_parallel_size > 1:
        return (
            f"pipeline parallelism (pipeline_parallel_size="
            f"{parallel_config.pipeline_parallel_size}): one planner for the groups of several "
            "stages is not supported yet"
        )
    return unsupported_anywhere(parallel_config, use)


def unsupported_layers(adaptor: Any) -> str:
    """Why the layers of a `VllmEplbAdaptor` cannot be balanced; "" if they can."""
    if missing := [name for name in OF_ADAPTOR if not hasattr(adaptor, name)]:
        return f"this vLLM-Ascend's VllmEplbAdaptor has no {', '.join(missing)}"
    layers = list(adaptor.moe_layers)
    if not layers:
        return "no mixture-of-experts layer was registered"
    for number, layer in enumerate(layers):
        if missing := [name for name in OF_LAYER if not hasattr(layer, name)]:
            return f"MoE layer {number} of this vLLM-Ascend has no {', '.join(missing)}"
        for name in BIASES:
            if getattr(layer, name, None) is not None:
                return (
                    f"MoE layer {number} has {name}, a bias per expert that vLLM-Ascend does not "
                    "move: it would stay behind when experts move"
                )
        if layer.get_log2phy_map() is None or layer.global_expert_map is None:
            return f"MoE layer {number} routes by no table, so its experts cannot move"
        if layer.global_expert_map.shape != layers[0].global_expert_map.shape:
            return (
                f"MoE layer {number} has an expert map of shape "
                f"{tuple(layer.global_expert_map.shape)} and layer 0 one of "
                f"{tuple(layers[0].global_expert_map.shape)}"
            )
    if len(layers[0].global_expert_map) == 1:
        return "an EP group of one rank: there is nothing to balance"
    return ""


def follow_runner(runner_class: type) -> None:
    """Let `runner_class` tell its updator, if it is ours, of its batch and of dummy passes."""

    def ours(runner: Any) -> FlashUpdator | None:
        updator = getattr(runner, "eplb_updator", None)
        if not isinstance(updator, FlashUpdator):
            return None
        if updator.worker is not None and getattr(runner, "is_pooling_model", False):
            updator.worker, updator.inert = None, POOLING  # else idle ranks would step alone
            log.error("flash_eplb does not balance: %s", POOLING)
        return updator

    def real(original: Method) -> Method:
        def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            updator = ours(self)
            if updator is not None:
                updator.tokens = int(scheduler_output.total_num_scheduled_tokens)
                updator.batch = self.input_batch
            return original(self, scheduler_output, *args, **kwargs)

        return execute_model

    def dummy(original: Method) -> Method:
        def _dummy_run(self: Any, *args: Any, **kwargs: Any) -> Any:
            with Flag(ours(self), "in_dummy"):
                return original(self, *args, **kwargs)

        return _dummy_run

    wrap_once(runner_class, "execute_model", real)
    wrap_once(runner_class, "_dummy_run", dummy)


def _configs() -> tuple[Any, Any, bool, str]:
    """The arguments of `unsupported_group`, so far as they are known here."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    module = sys.modules.get("vllm_ascend.ascend_config")
    model = getattr(config, "model_config", None)
    return (
        getattr(config, "parallel_config", None),
        None if module is None else module.get_ascend_config(),
        getattr(model, "runner_type", None) == "pooling",
        unsupported_use(config),
    )


def platforms() -> list[str]:
    """Names of vLLM-Ascend's platform plug-ins; none if it is not installed."""
    entries = entry_points(group="vllm.platform_plugins")
    return [entry.name for entry in entries if entry.value.startswith("vllm_ascend")]


def left_out(platforms: list[str], allowed: str | None) -> str:
    """The first of `platforms` that `VLLM_PLUGINS` leaves out; "" if it names all.

    Args:
        platforms: see the function of that name.
        allowed: the value of the variable; None if it is unset, which lets all in.
    """
    if allowed is None:
        return ""
    names = {name.strip() for name in allowed.split(",")}
    return next((name for name in platforms if name not in names), "")


def is_off(vllm_config: Any) -> str:
    """What of vLLM-Ascend's settings keeps its model runner V1 from balancing; "" if nothing."""
    additional = vllm_config.additional_config or {}
    settings = additional.get("eplb_config", {}) if isinstance(additional, dict) else {}
    if settings.get("dynamic_eplb") or settings.get("expert_map_record_path"):
        return ""
    return (
        'vLLM-Ascend runs without {"eplb_config": {"dynamic_eplb": true}} in --additional-config '
        "(and DYNAMIC_EPLB=true in the environment)"
    )
