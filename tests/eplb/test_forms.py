"""Expert tensors that are not held alike: as bytes they would be other weights."""

import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_worker import Workers

PLAIN = "float32 (3, 3) of stride (3, 1)"
TURNED = "float32 (3, 3) of stride (1, 3)"


def turned(tensor):
    """Equal to `tensor`, the last dimension first in memory."""
    return tensor.t().contiguous().t()


@pytest.fixture
def start(session):
    """Start two workers, the tensors of layer 1 on each rank as given; why they do not balance."""
    made = []

    def run(*layers):
        group = Workers(session)
        made.append(group)
        for engine, layer in zip(group.engines, layers, strict=True):
            engine.weights[1] = layer
        group.step()
        reasons = [worker.refused for worker in group.workers]
        assert reasons[0] == reasons[1]
        return reasons[0]

    yield run
    for group in made:
        group.close()


def held(rows=3, columns=3):
    """A tensor per slot; all experts have equal weights."""
    return [torch.arange(rows * columns).view(rows, columns).float() for _ in range(3)]


@pytest.mark.parametrize("columns", [3, 5])
def test_ranks_with_other_orders_of_memory_do_not_balance(start, columns):
    plain = held(3, columns)
    reason = start([plain], [[turned(tensor) for tensor in plain]])
    assert reason.startswith(
        f"layer 1 tensor 0 is float32 (3, {columns}) of stride (1, 3) on EP rank 1 and float32 "
        f"(3, {columns}) of stride ({columns}, 1) on EP rank 0: experts travel as bytes"
    )


def test_slots_with_other_orders_of_memory_do_not_balance(start):
    mixed = held()
    mixed[2] = turned(mixed[2])
    reason = start([held(), held()], [held(), mixed])
    assert reason.startswith(
        f"EP rank 1: layer 1 tensor 1 is {TURNED} in slot 2 and {PLAIN} in slot 0: "
    )


def test_other_shapes_and_types_of_as_many_bytes_do_not_balance(start):
    wide, half = torch.zeros(3, 2, 4), torch.zeros(3, 8, dtype=torch.float16)
    assert start([wide], [wide.view(3, 4, 2)]).startswith(
        "layer 1 tensor 0 is float32 (4, 2) on EP rank 1 and float32 (2, 4) on EP rank 0: "
    )
    assert start([wide, half], [wide, half.to(torch.bfloat16)]).startswith(
        "layer 1 tensor 1 is bfloat16 (8,) on EP rank 1 and float16 (8,) on EP rank 0: "
    )
    assert start([wide, half], [wide[:, :1], wide[:, 1:], half]).startswith(
        "layer 1 has 3 expert tensors on EP rank 1 and 2 on EP rank 0: "
    )


def test_what_is_held_alike_balances(start):
    assert start([[turned(tensor) for tensor in held()]], [[turned(t) for t in held()]]) == ""


def test_the_stride_of_a_single_row_means_nothing(start):
    narrow = [tensor[:1] for tensor in held()]
    assert start([narrow], [[tensor.as_strided((1, 3), (7, 1)) for tensor in narrow]]) == ""


def test_layers_that_share_memory_do_not_balance(session):
    group = Workers(session)
    for engine in group.engines:
        engine.weights[1] = engine.weights[0]
    group.step()
    (reason,) = {worker.refused for worker in group.workers}
    group.close()
    assert re.fullmatch(
        r"EP rank 0: layer 0 tensor (\d) slot 0 and layer 1 tensor \1 slot 0 lie in the same "
        "memory: an expert that moves to one would change the other, too",
        reason,
    )


@pytest.mark.parametrize("step", [0, 5])
def test_rows_that_overlap_do_not_balance(start, step):
    stack = torch.arange(40.0).as_strided((3, 10), (step, 1))
    reason = start([stack], [stack])
    assert "tensor 0 slot 0 and layer 1 tensor 0 slot 1 lie in the same memory" in reason
