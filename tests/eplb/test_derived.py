"""Tensors that belong to experts and that nobody would move."""

from types import SimpleNamespace

import pytest
import torch

from flash_eplb.eplb.derived import left_behind
from flash_eplb.eplb.support import unsupported_model

SLOTS = 4


class Part:
    """As if vLLM had defined it."""

    __module__ = "vllm.model_executor.layers.fused_moe"

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w13_weight = torch.nn.Parameter(torch.zeros(SLOTS, 6, 2), requires_grad=False)
        self.w2_weight = torch.nn.Parameter(torch.rand(SLOTS, 2, 3), requires_grad=False)
        self.register_buffer("expert_map", torch.zeros(16, dtype=torch.int32))

    def moved(self):
        return [self.w13_weight.view(SLOTS, -1), self.w2_weight.view(SLOTS, -1)]


def test_a_plain_layer_leaves_nothing_behind():
    layer = Layer()
    assert left_behind(layer, layer.moved(), SLOTS) == ""


def test_a_parameter_that_is_not_handed_out_is_named():
    layer = Layer()
    assert left_behind(layer, layer.moved()[:1], SLOTS) == "w2_weight"


@pytest.mark.parametrize("owner", ["buffer", "attribute", "quant_method", "deep"])
def test_a_derived_tensor_is_found_wherever_it_is_kept(owner):
    layer, scales = Layer(), torch.ones(SLOTS, 1)
    scales[1] = 2
    if owner == "buffer":
        layer.register_buffer("scales", scales)
    elif owner == "attribute":
        layer.scales = scales
    elif owner == "quant_method":
        layer.quant_method = Part(layer=layer, scales=scales)
    else:
        config = Part(_w1=Part(scale=scales))
        layer.quant_method = Part(kernel=Part(experts=[Part(quant_config=config)]))
    name = left_behind(layer, layer.moved(), SLOTS)
    assert name.endswith("_w1.scale" if owner == "deep" else "scales")


def test_views_of_what_is_moved_move_with_it():
    layer = Layer()
    layer.quant_method = Part(kernel=Part(w1=layer.w13_weight.transpose(1, 2), w2=layer.w2_weight))
    assert left_behind(layer, layer.moved(), SLOTS) == ""


def test_what_all_experts_share_may_stay():
    layer = Layer()
    layer.e_score_correction_bias = torch.zeros(SLOTS)
    layer.quant_method = Part(a1_scale=torch.ones(1).expand(SLOTS), block=torch.zeros(2, SLOTS))
    layer.w13_input_scale = torch.arange(SLOTS)
    layer.quant_method.ab_strides1 = torch.full((SLOTS,), 64)
    assert left_behind(layer, layer.moved(), SLOTS) == ""


def test_rings_of_objects_end():
    layer = Layer()
    first, second = Part(), Part()
    first.other, second.other = second, first
    layer.quant_method = first
    assert left_behind(layer, layer.moved(), SLOTS) == ""


def test_a_model_with_such_a_tensor_is_refused_by_name():
    layers = [Layer(), Layer()]
    state = SimpleNamespace(
        model_name="m",
        physical_to_logical_map=torch.zeros(2, 8),
        logical_replica_count=torch.zeros(2, 6),
        model=SimpleNamespace(
            expert_weights=[layer.moved() for layer in layers],
            moe_layers=[SimpleNamespace(routed_experts=layer) for layer in layers],
        ),
    )
    assert unsupported_model([state], ranks=2) == ""
    layers[1].quant_method = Part(g1_alphas=torch.arange(SLOTS))
    assert unsupported_model([state], ranks=2) == (
        "m: quant_method.g1_alphas of MoE layer 1 has a row for each expert and vLLM does not hand "
        "it out: it would stay behind when experts move"
    )
