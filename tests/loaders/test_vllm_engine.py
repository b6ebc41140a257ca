from types import SimpleNamespace

import numpy as np
import torch

from flash_eplb.loaders.copies import Copies
from flash_eplb.loaders.vllm_engine import VllmEngine

EXPERTS, RANKS, SLOTS = 4, 2, 3


def state(name, layers):
    """What vLLM registers for one model, before its first step."""
    physical = torch.arange(RANKS * SLOTS).remainder(EXPERTS).repeat(layers, 1)
    return SimpleNamespace(
        model_name=name,
        model=SimpleNamespace(
            expert_weights=[[torch.zeros(SLOTS, 5)] for _ in range(layers)],
        ),
        expert_load_pass=torch.zeros((layers, RANKS * SLOTS), dtype=torch.int32),
        physical_to_logical_map=physical,
        logical_to_physical_map=torch.full((layers, EXPERTS, 1024), -1),
        logical_replica_count=torch.zeros((layers, EXPERTS), dtype=torch.int64),
    )


def columns_of(state, layer, expert):
    count = int(state.logical_replica_count[layer, expert])
    row = state.logical_to_physical_map[layer, expert]
    assert (row[count:] == -1).all()
    return row[:count].tolist()


def test_models_follow_one_another_a_drafter_first_where_it_came_first():
    draft, main = state("draft", 1), state("main", 2)
    engine = VllmEngine([draft, main], RANKS)
    assert engine.models == [("draft", 1), ("main", 2)]
    assert len(engine.weights) == 3
    assert engine.placement.shape == (3, RANKS, SLOTS)
    assert [len(load) for load in engine.loads] == [1, 2]
    draft.expert_load_pass += 1  # the collector sees what vLLM counts, not a copy
    assert engine.loads[0].sum() == RANKS * SLOTS


def test_a_commit_changes_the_tables_of_its_layers_in_place():
    draft, main = state("draft", 1), state("main", 2)
    engine = VllmEngine([draft, main], RANKS)
    table = main.logical_to_physical_map
    placement = engine.placement.copy()
    placement[2] = [[3, 2, 1], [0, 3, 1]]
    Copies(*engine.tables(np.array([2]), placement)).run()
    assert main.logical_to_physical_map is table
    assert main.physical_to_logical_map[1].tolist() == [3, 2, 1, 0, 3, 1]
    assert [columns_of(main, 1, expert) for expert in range(4)] == [[3], [2, 5], [1], [0, 4]]
    assert main.physical_to_logical_map[0].tolist() == [0, 1, 2, 3, 0, 1]
    assert not main.logical_replica_count[0].any()


def test_routing_weights_become_repeated_columns_and_go_again():
    main = state("main", 2)
    engine = VllmEngine([main], RANKS)
    columns = np.array([[[3, 1, 1], [1, 1, 2]]])  # of experts 0 1 2 and 3 0 1 in layer 1
    Copies(*engine.tables(np.array([1]), engine.placement, columns)).run()
    assert columns_of(main, 1, 0) == [0, 0, 4, 0]
    assert columns_of(main, 1, 1) == [5, 1, 5]
    assert columns_of(main, 1, 2) == [2]
    Copies(*engine.tables(np.array([1]), engine.placement)).run()
    assert [columns_of(main, 1, expert) for expert in range(4)] == [[0, 4], [1, 5], [2], [3]]


def test_a_parameter_that_gets_other_memory_is_named():
    made = state("main", 2)
    layers = [torch.nn.Module(), torch.nn.Module()]
    for layer in layers:
        layer.w2_weight = torch.nn.Parameter(torch.zeros(SLOTS, 5, 2), requires_grad=False)
        layer.gate = torch.nn.Linear(3, 3)  # not handed out: whoever likes may replace it
    made.model.moe_layers = [SimpleNamespace(routed_experts=layer) for layer in layers]
    made.model.expert_weights = [[layer.w2_weight.view(SLOTS, -1)] for layer in layers]
    engine = VllmEngine([state("draft", 1), made], RANKS)
    layers[0].gate = torch.nn.Linear(3, 3)
    layers[1].w2_weight += 1
    assert [engine.replaced(layer) for layer in range(3)] == ["", "", ""]
    layers[0].w2_weight.data = layers[0].w2_weight.data.clone()
    assert [engine.replaced(layer) for layer in range(3)] == ["", "w2_weight", ""]
    del layers[1].w2_weight
    assert [engine.replaced(layer) for layer in range(3)] == ["", "w2_weight", "w2_weight"]
