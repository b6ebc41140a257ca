"""Tensors that belong to experts and that nobody would move."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flash_eplb.eplb.derived import left_behind, shared_scales
from flash_eplb.eplb.ranges import Ranges
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


def flat(*widths):
    """Tensors [SLOTS, width] that share one storage, one after the other, with random values."""
    whole = torch.rand(SLOTS * sum(widths))
    return [part.view(SLOTS, -1) for part in whole.split([SLOTS * width for width in widths])]


def test_what_lies_in_the_same_storage_does_not_move_with_it():
    weight, scale = flat(6, 2)
    layer = SimpleNamespace(weight=weight, scale=scale)
    assert left_behind(layer, [weight], SLOTS) == "scale"
    assert left_behind(layer, [weight, scale], SLOTS) == ""
    layer.whole = torch.as_strided(weight, (SLOTS, 8), (8, 1))
    assert left_behind(layer, [weight, scale], SLOTS) == ""


def test_what_lies_between_the_rows_that_move_does_not_move():
    records = torch.rand(SLOTS, 8)
    weight, scale = records[:, :6], records[:, 6:]
    layer = SimpleNamespace(weight=weight, scale=scale)
    assert left_behind(layer, [weight], SLOTS) == "scale"
    layer = SimpleNamespace(weight=weight, records=records)
    assert left_behind(layer, [list(weight)], SLOTS) == "records"
    assert left_behind(layer, [weight, list(scale)], SLOTS) == ""
    layer = SimpleNamespace(odd=records[:, 1::2])
    assert left_behind(layer, [records[:, :7]], SLOTS) == "odd"
    assert left_behind(layer, [records[:, 1:]], SLOTS) == ""


def test_a_view_over_the_end_of_what_moves_is_found():
    weight, scale = flat(6, 2)
    layer = SimpleNamespace(weight=weight, over=torch.as_strided(weight, (SLOTS, 7), (7, 1)))
    assert left_behind(layer, [weight], SLOTS) == "over"
    assert left_behind(layer, [weight, scale[:2]], SLOTS) == ""


def test_any_view_is_found_unless_all_of_its_elements_move():
    """Against every element's address, for random rows that move and random views."""
    rng, storage = random.Random(3), torch.rand(200)
    found = set()
    for _ in range(500):
        holes = sorted(rng.sample(range(200), rng.randrange(1, 40)))
        edges = zip([-1, *holes], [*holes, 200], strict=True)
        rows = Ranges(storage[left + 1 : right] for left, right in edges)
        shape = [rng.randrange(1, 5) for _ in range(3)]
        strides = [rng.randrange(13) for _ in range(3)]
        first = rng.randrange(40)
        view = torch.as_strided(storage, shape, strides, first)
        elements = torch.as_strided(torch.arange(200), shape, strides, first).flatten().tolist()
        assert rows.hold(view) == (not {*holes} & {*elements})
        found.add(rows.hold(view))
    assert found == {True, False}


def test_what_all_experts_share_may_stay():
    layer = Layer()
    layer.e_score_correction_bias = torch.zeros(SLOTS)
    layer.quant_method = Part(a1_scale=torch.ones(1).expand(SLOTS), block=torch.zeros(2, SLOTS))
    layer.w13_input_scale = torch.full((1,), 0.5).expand(SLOTS)
    layer.w2_input_scale = torch.full((SLOTS,), 0.5)
    layer.quant_method.ab_strides1 = torch.full((SLOTS,), 64)
    assert left_behind(layer, layer.moved(), SLOTS) == ""


@pytest.mark.parametrize(
    "kept",
    [
        [torch.full((6, 5), float(slot)) for slot in range(SLOTS)],
        tuple(0.5 * slot for slot in range(SLOTS)),
        np.arange(SLOTS, dtype=np.float32),
    ],
    ids=["tensors", "floats", "array"],
)
def test_what_is_kept_in_a_list_or_an_array_for_each_expert_is_found(kept):
    layer = Layer()
    layer.kept = kept
    assert left_behind(layer, layer.moved(), SLOTS) == "kept"
    layer.kept = type(kept)([kept[0]] * SLOTS) if not isinstance(kept, np.ndarray) else kept * 0
    assert left_behind(layer, layer.moved(), SLOTS) == ""


def test_lists_of_rows_that_move_and_of_sizes_are_no_reason_to_refuse():
    layer = Layer()
    layer.w13_weight_list = list(layer.w13_weight)
    layer.shape, layer.some = (4, 8, 16, 32), [torch.zeros(size) for size in range(SLOTS)]
    assert left_behind(layer, layer.moved(), SLOTS) == ""


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.int4])
def test_rows_of_types_that_torch_does_not_compare_are_told_apart(kind):
    layer = Layer()
    for last, name in ((1, ""), (2, "scales")):
        rows = torch.tensor([[1], [1], [1], [last]], dtype=torch.uint8).view(kind)
        for kept in (rows, list(rows)):
            layer.scales = kept
            assert left_behind(layer, layer.moved(), SLOTS) == name


def test_tensors_in_objects_of_a_kernels_library_are_found():
    wrapped = type("Tensor", (), {"__module__": "triton_kernels.tensor"})()
    wrapped.storage = Part(data=torch.rand(SLOTS, 16))
    layer = Layer()
    layer.quant_method = Part(config=wrapped)
    assert left_behind(layer, layer.moved(), SLOTS) == "quant_method.config.storage.data"


def test_a_part_is_looked_into_from_the_shortest_way_to_it():
    kernel = Part(experts=Part(quant_config=Part(_w1=Part(scale=torch.arange(SLOTS)))))
    ways = {
        "long": Part(context=Part(layers=[Part(owner=Part(kernel=kernel))])),
        "short": Part(kernel=kernel),
    }
    for order in (("long", "short"), ("short", "long")):
        layer = Layer()
        for name in order:
            setattr(layer, name, ways[name])
        name = left_behind(layer, layer.moved(), SLOTS)
        assert name == "short.kernel.experts.quant_config._w1.scale"


def test_an_activation_scale_for_each_expert_is_no_shared_one():
    layer = Layer()
    layer.w13_input_scale = torch.arange(SLOTS).float()
    assert left_behind(layer, layer.moved(), SLOTS) == "w13_input_scale"


def test_what_the_experts_share_is_told_with_its_value():
    layer = Layer()
    layer.w13_input_scale, layer.w2_input_scale = torch.tensor(0.5), torch.ones(1).expand(SLOTS)
    layer.quant_method = Part(_a1=Part(alpha_or_gscale=torch.full((SLOTS,), 2.0)))
    layer.block_scale, layer.scale_places = torch.rand(2, 2), torch.tensor(3)
    layer.shared_experts = Part(weight_scale=torch.tensor(7.0))
    assert shared_scales(layer, layer.moved(), SLOTS) == {
        "w13_input_scale": 0.5,
        "w2_input_scale": 1.0,
        "quant_method._a1.alpha_or_gscale": 2.0,
    }


def test_a_scale_of_the_only_expert_of_a_rank_is_one_that_experts_share():
    weight = torch.rand(1, 6)
    layer = SimpleNamespace(weight=weight, weight_scale=torch.ones(1, 1), a1_scale=torch.ones(1))
    moved = [weight, layer.weight_scale]
    assert left_behind(layer, moved, 1) == ""
    assert shared_scales(layer, moved, 1) == {"a1_scale": 1.0}


@pytest.mark.parametrize("shape", [(2, 8 * SLOTS), (SLOTS * 4, 4), (16 * SLOTS,)])
def test_a_copy_of_what_moves_is_found_in_whatever_order(shape):
    weight = torch.rand(SLOTS, 16)
    layer = SimpleNamespace(weight=weight, packed=weight.clone().view(shape))
    assert left_behind(layer, [weight], SLOTS) == "packed"
    layer.packed = weight.view(shape)
    assert left_behind(layer, [weight], SLOTS) == ""
    layer.packed = torch.zeros(shape, dtype=torch.int32)
    assert left_behind(layer, [weight], SLOTS) == ""


def test_what_a_pass_has_sent_is_not_taken_for_weights():
    layer, handle = Layer(), (torch.rand(SLOTS, 32), torch.arange(SLOTS), 64)
    sender = Part(handles=[handle, None])
    layer.quant_method = Part(moe_kernel=Part(impl=Part(prepare_finalize=sender)))
    assert left_behind(layer, layer.moved(), SLOTS) == ""
    layer.quant_method.moe_kernel.impl.fused_experts = sender
    assert left_behind(layer, layer.moved(), SLOTS).endswith("fused_experts.handles.0.0")


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
    wrapped = type("Tensor", (), {"__module__": "triton_kernels.tensor"})()
    layers[0].quant_method, weight = Part(), layers[0].w13_weight
    del layers[0].w13_weight
    layers[0].w13_weight = wrapped
    assert unsupported_model([state], ranks=2) == (
        "m: w13_weight of MoE layer 0 is a triton_kernels.tensor.Tensor: the kernel keeps weights "
        "in a way that cannot be moved; choose another MoE backend"
    )
    layers[0].w13_weight = weight
    state.model.expert_weights[0], kept = [], state.model.expert_weights[0]
    assert unsupported_model([state], ranks=2) == "m: vLLM hands out no expert tensor of layer 0"
    state.model.expert_weights[0] = kept
    layers[1].quant_method = Part(g1_alphas=torch.arange(SLOTS))
    assert unsupported_model([state], ranks=2) == (
        "m: quant_method.g1_alphas of MoE layer 1 has a part for each expert and vLLM does not "
        "hand it out: it would stay behind when experts move"
    )
