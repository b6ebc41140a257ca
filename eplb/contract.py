"""What we touch of vLLM: one table, read by the probe at start and by the recorder of contracts.

Each row is a name that must be there, with the parameters that we pass or that we look at. vLLM
0.30 to 0.33 have them all (`tests/contract/`); a version that lacks one is refused, by that name.
"""

from __future__ import annotations

from typing import NamedTuple

V1, V2 = "V1", "V2"

_STATE = "vllm.distributed.eplb.eplb_state"
_COMMUNICATOR = "vllm.distributed.eplb.eplb_communicator"
_PARALLEL = "vllm.distributed.parallel_state"
_RUNNER_V1 = "vllm.v1.worker.gpu_model_runner"
_BATCH_V1 = "vllm.v1.worker.gpu_input_batch"
_RUNNER_V2 = "vllm.v1.worker.gpu.model_runner"
_BATCH_V2 = "vllm.v1.worker.gpu.input_batch"
_EPLB_V2 = "vllm.v1.worker.gpu.eplb_utils"
_WORKER = "vllm.v1.worker.gpu_worker"
_PARALLEL_CONFIG = "vllm.config.parallel"
_CONFIG = "vllm.config.vllm"
_MOE = "vllm.model_executor.layers.fused_moe.runner.moe_runner"
_INTERFACES = "vllm.model_executor.models.interfaces"
_ROUTER = "vllm.model_executor.layers.fused_moe.router.base_router"


class Need(NamedTuple):
    """A name that we rely on.

    Attributes:
        module, name: "Class.member", "Class" or "function" of the module.
        first: its first parameters, in their places (without `self`).
        takes: parameters that it must have, wherever.
        decorators: that it must bear.
        calls: (name, how often): calls of that name in its body, of a class in all of it.
        runner: the model runner that needs it; "" for both.
        optional: recorded where it is, but not missed.
    """

    module: str
    name: str
    first: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    decorators: tuple[str, ...] = ()
    calls: tuple[tuple[str, int], ...] = ()
    runner: str = ""
    optional: bool = False


def _members(module: str, owner: str, names: str, runner: str = "") -> list[Need]:
    """Attributes, fields and methods that are only named."""
    return [Need(module, f"{owner}.{name}", runner=runner) for name in names.split()]


NEEDS: list[Need] = [
    # our subclass of the state
    Need(_STATE, "EplbState.__init__", first=("parallel_config", "device")),
    Need(_STATE, "EplbState.add_model", first=("model", "model_config")),
    Need(_STATE, "EplbState.prepare_forward", first=("model_config", "num_unpadded_tokens")),
    Need(_STATE, "EplbState.step", first=("is_dummy", "is_profile")),
    Need(_STATE, "EplbState.rearrange"),
    *_members(_STATE, "EplbState", "model_states is_async should_record_tensor"),
    # what the adaptor reads and writes in place
    *_members(
        _STATE,
        "EplbModelState",
        "physical_to_logical_map logical_to_physical_map logical_replica_count expert_load_pass "
        "model_name model expert_buffer communicator num_unpadded_tokens_tensors",
    ),
    *_members(_INTERFACES, "MixtureOfExperts", "expert_weights moe_layers"),
    *_members(_MOE, "MoERunner", "routed_experts do_naive_dispatch_combine"),
    Need(
        _ROUTER,
        "eplb_map_to_physical_and_record",
        takes=(
            "expert_load_view",
            "logical_to_physical_map",
            "logical_replica_count",
            "record_enabled",
            "num_unpadded_tokens",
        ),
    ),
    # the group and the configuration
    Need(_PARALLEL, "get_ep_group"),
    *_members(_PARALLEL, "GroupCoordinator", "world_size rank_in_group cpu_group"),
    *_members(
        _PARALLEL_CONFIG,
        "ParallelConfig",
        "tensor_parallel_size data_parallel_size pipeline_parallel_size "
        "prefill_context_parallel_size enable_elastic_ep enable_eplb all2all_backend use_ubatching",
    ),
    *_members(_CONFIG, "VllmConfig", "model_config use_v2_model_runner"),
    Need("vllm.config.model", "ModelConfig.runner_type"),
    Need("vllm.config.model", "ModelConfig.enable_sleep_mode"),
    Need(_CONFIG, "get_current_vllm_config_or_none"),
    Need("vllm.engine.arg_utils", "EngineArgs.create_engine_config"),
    # the calls around which weights are written or read, the warm-up, and the end
    *_members(
        _WORKER,
        "Worker",
        "reload_weights start_weight_update start_draft_weight_update update_weights "
        "finish_weight_update save_sharded_state save_tensorized_model compile_or_warm_up_model "
        "shutdown",
    ),
    Need(_WORKER, "Worker.compute_weight_checksums", optional=True),
    Need(_WORKER, "Worker.reset_weights", optional=True),
    # vLLM's own transports
    Need(_COMMUNICATOR, "EplbCommunicator.set_transfer_context", ("old_indices", "layer_idx")),
    Need(_COMMUNICATOR, "EplbCommunicator.add_send", ("tensors", "dst_rank", "expert_id")),
    Need(_COMMUNICATOR, "EplbCommunicator.add_recv", ("tensors", "src_rank", "expert_id")),
    Need(_COMMUNICATOR, "EplbCommunicator.execute"),
    Need(_COMMUNICATOR, "NixlEplbCommunicator.execute", calls=(("_post_read_barrier", 1),)),
    # model runner V1: each pass steps once, and only real ones prepare
    Need(
        _RUNNER_V1,
        "GPUModelRunner",
        calls=(("prepare_forward", 1), ("eplb_step", 2)),
        runner=V1,
    ),
    Need(_RUNNER_V1, "GPUModelRunner.eplb_step", ("is_dummy", "is_profile"), runner=V1),
    Need(
        _RUNNER_V1,
        "GPUModelRunner.execute_model",
        calls=(("prepare_forward", 1),),
        runner=V1,
    ),
    Need(_RUNNER_V1, "GPUModelRunner.sample_tokens", calls=(("eplb_step", 1),), runner=V1),
    Need(
        _RUNNER_V1,
        "GPUModelRunner._dummy_run",
        takes=("skip_eplb", "is_profile"),
        calls=(("eplb_step", 1),),
        runner=V1,
    ),
    *_members(_RUNNER_V1, "GPUModelRunner", "eplb_state input_batch", V1),
    *_members(_BATCH_V1, "InputBatch", "num_reqs num_computed_tokens_cpu num_prompt_tokens", V1),
    # model runner V2: dummy passes prepare too; sampling, pooling and dummy passes step
    Need(
        _RUNNER_V2,
        "GPUModelRunner",
        calls=(("prepare_forward", 1), ("step_eplb_after", 3)),
        runner=V2,
    ),
    Need(
        _RUNNER_V2,
        "GPUModelRunner.execute_model",
        takes=("dummy_run",),
        calls=(("prepare_forward", 1),),
        runner=V2,
    ),
    Need(_RUNNER_V2, "GPUModelRunner.sample_tokens", decorators=("step_eplb_after",), runner=V2),
    Need(_RUNNER_V2, "GPUModelRunner.pool", decorators=("step_eplb_after",), runner=V2),
    Need(
        _RUNNER_V2,
        "GPUModelRunner._dummy_run",
        takes=("skip_eplb", "is_profile"),
        decorators=("step_eplb_after",),
        calls=(("execute_model", 1),),
        runner=V2,
    ),
    *_members(_RUNNER_V2, "GPUModelRunner", "eplb_state execute_model_state", V2),
    *_members(_RUNNER_V2, "ExecuteModelState", "input_batch", V2),
    *_members(_BATCH_V2, "InputBatch", "num_reqs is_prefilling_np", V2),
    Need(_EPLB_V2, "step_eplb_after", takes=("is_dummy",), calls=(("step", 1),), runner=V2),
    Need(
        _EPLB_V2,
        "EPLBController.step",
        ("is_dummy", "is_profile"),
        calls=(("step", 1),),
        runner=V2,
    ),
    Need(
        _EPLB_V2,
        "EPLBController.prepare_forward",
        ("model_config", "num_unpadded_tokens"),
        calls=(("prepare_forward", 1),),
        runner=V2,
    ),
    *_members(_EPLB_V2, "EPLBController", "state suppressed", V2),
]
