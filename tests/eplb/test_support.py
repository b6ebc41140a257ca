import logging
from types import SimpleNamespace

import pytest
import torch

from flash_eplb.eplb.support import (
    divided_batch,
    lent_weights,
    unsupported_mode,
    unsupported_model,
    unsupported_use,
)


def config(**changes):
    fields = {
        "tensor_parallel_size": 2,
        "data_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "enable_elastic_ep": False,
        "all2all_backend": "allgather_reducescatter",
        "use_ubatching": False,
    }
    return SimpleNamespace(**{**fields, **changes})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("runner_v2", [False, True])
def test_tensor_or_data_parallel_groups_are_supported(device, runner_v2):
    assert unsupported_mode(config(), device, runner_v2) == ""
    alone = config(tensor_parallel_size=1, data_parallel_size=2)
    assert unsupported_mode(alone, device, runner_v2) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism (pipeline_parallel_size=2)"),
        ({"enable_elastic_ep": True}, "elastic expert parallelism"),
        ({"enable_fault_tolerance": True}, "fault tolerance (enable_fault_tolerance)"),
        ({"tensor_parallel_size": 1}, "an EP group of one rank"),
        ({"data_parallel_size": 2}, "TP=2, DP=2"),
        (
            {"tensor_parallel_size": 1, "data_parallel_size": 2, "all2all_backend": "naive"},
            "naive dispatch",
        ),
        ({"use_ubatching": True}, "dual batch overlap (enable_dbo or ubatch_size)"),
        ({"prefill_context_parallel_size": 2}, "prefill_context_parallel_size=2"),
    ],
)
def test_an_unsupported_mode_is_refused_by_name(changes, reason):
    assert reason in unsupported_mode(config(**changes), "cpu", False)


def test_other_devices_are_refused_by_name():
    assert "device 'xpu'" in unsupported_mode(config(), "xpu", False)


def test_pipeline_stages_are_refused_with_the_reason_of_the_runner():
    stages = config(pipeline_parallel_size=2)
    assert "stages before the last do not count steps" in unsupported_mode(stages, "cuda", False)
    assert "each stage is an EP group of its own" in unsupported_mode(stages, "cuda", True)


def test_sleep_mode_is_refused_by_name():
    use = unsupported_use(SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=True)))
    reason = unsupported_mode(config(), "cuda", True, use=use)
    assert reason.startswith("sleep mode (enable_sleep_mode): ")


def test_adapters_are_refused_by_name():
    """Those of experts lie by slot, in tensors [adapters, slots, ...], and nobody moves them."""
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(), lora_config=None)
    assert unsupported_use(vllm_config) == unsupported_use(None) == ""
    vllm_config.lora_config = SimpleNamespace(max_loras=1)
    reason = unsupported_mode(config(), "cuda", True, use=unsupported_use(vllm_config))
    assert reason.startswith("LoRA (enable_lora): ")
    assert "serve without adapters" in reason


def test_a_pooling_model_is_refused_where_its_passes_are_not_stepped():
    assert "model runner V1 does not step" in unsupported_mode(config(), "cuda", False, pools=True)
    assert unsupported_mode(config(), "cuda", True, pools=True) == ""


def state(physical=10, experts=8, weights=None):
    slots = physical // 2
    model = SimpleNamespace(expert_weights=weights or [[torch.zeros(slots, 6)]])
    return SimpleNamespace(
        model=model,
        model_name="m",
        physical_to_logical_map=torch.zeros(1, physical),
        logical_replica_count=torch.zeros(1, experts),
    )


def test_a_model_whose_experts_are_rows_is_supported():
    assert unsupported_model([state()], ranks=2) == ""


def test_models_that_cannot_be_moved_are_refused_by_name():
    assert "no mixture-of-experts model" in unsupported_model([], ranks=2)
    assert "do not divide by 3" in unsupported_model([state()], ranks=3)
    assert "5 slots on a rank for 4 experts" in unsupported_model([state(experts=4)], ranks=2)
    strided = state(weights=[[torch.zeros(6, 5).t()]])
    assert "cannot be moved row by row" in unsupported_model([strided], ranks=2)
    listed = state(weights=[[[torch.zeros(6, 4).t()] * 5]])
    assert unsupported_model([listed], ranks=2) == ""
    short = state(weights=[[torch.zeros(4, 6)]])
    assert "has 4 rows of shape (6,)" in unsupported_model([short], ranks=2)


def test_experts_that_are_offloaded_are_refused_by_name():
    """Of some layers, as in vLLM: on the host an expert has another digest than on a device."""
    made = state(weights=[[torch.zeros(5, 6, device="meta")], [torch.zeros(5, 6)]])
    made.physical_to_logical_map = torch.zeros(1, 10, device="meta")
    reason = unsupported_model([made], ranks=2)
    assert reason.startswith("m: an expert tensor of layer 1 lies on cpu and is copied to meta")
    assert "cpu_offload_gb, offload_group_size" in reason
    made.model.expert_weights.pop()
    assert unsupported_model([made], ranks=2) == ""


def test_a_layer_whose_kernel_does_not_dispatch_by_itself_is_refused_by_name():
    made = state()
    made.model.moe_layers = [SimpleNamespace(do_naive_dispatch_combine=False)]
    assert unsupported_model([made], ranks=2) == ""
    made.model.moe_layers[0].do_naive_dispatch_combine = True
    assert "m: naive dispatch in MoE layer 0" in unsupported_model([made], ranks=2)


class Sharded(torch.nn.Module):
    """As vLLM's models and layers say that they divide a batch among the tensor-parallel ranks."""

    def __init__(self, **says):
        super().__init__()
        vars(self).update(says)


@pytest.mark.parametrize(
    "says",
    [{"use_sequence_parallel": True}, {"moe_config": SimpleNamespace(is_sequence_parallel=True)}],
)
def test_ranks_that_each_run_tokens_of_their_own_are_refused_by_name(says):
    made = state()
    assert divided_batch([made]) == ""
    made.model = torch.nn.Sequential(Sharded(use_sequence_parallel=False), torch.nn.ReLU())
    assert divided_batch([made]) == ""
    made.model.append(Sharded(**says))
    reason = divided_batch([made])
    assert reason.startswith("m: sequence parallelism in Sharded")
    assert "use data_parallel_size in place of tensor_parallel_size" in reason


def test_the_state_asks_whether_a_batch_is_divided(monkeypatch):
    level = logging.root.level
    from flash_eplb.eplb import vllm_state

    logging.root.setLevel(level)
    monkeypatch.setattr(vllm_state, "divided_batch", lambda states: "sequence parallelism")
    asked = vllm_state.FlashState()._unsupported([state()], 2)
    assert asked == "sequence parallelism"


def loaded(load_format="auto", draft=None, **extra):
    load = SimpleNamespace(load_format=load_format, model_loader_extra_config=extra)
    speculative = SimpleNamespace(draft_load_config=loaded(draft).load_config) if draft else None
    return SimpleNamespace(load_config=load, speculative_config=speculative)


def test_weights_that_other_engines_map_or_copy_as_they_lie_are_named():
    """A restarted engine takes them for those of the start, and answers nonsense."""
    assert lent_weights(None) == lent_weights(loaded()) == ""
    assert lent_weights(loaded("ipc_cache", mode="copy")) == ""
    cached = lent_weights(loaded("ipc_cache", socket_dir="/run/weights"))
    assert cached.startswith("load_format=ipc_cache: experts lie in the memory of vLLM's weight")
    assert """set --model-loader-extra-config '{"mode": "copy"}'""" in cached
    assert lent_weights(loaded(draft="ipc_cache")) == cached
    for name in ("modelexpress", "netloader"):
        assert lent_weights(loaded(name)).startswith(f"load_format={name}: other engines copy")
