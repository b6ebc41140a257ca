"""vLLM-Ascend's model runner V1: its real classes around our updator and loader, over gloo."""

import json

import pytest

RELEASED = "0.23.0"
CASES = [
    "NONE/0/planner",
    "NONE/1",
    "W8A8/0/multi",
    "W8A8/1/map",
    "W4A8/1",
    "MXFP4/0",
    "MXFP4/1",
    "MXFP8/0",
    "MXFP8/1/multi",
]
"""Every quantisation that its table knows, with both modes of fused MC2."""


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_quantisation_s_experts_move_with_its_own_classes(source, run_ranks, ranks):
    logs = run_ranks("v1_rank.py", source(RELEASED), RELEASED, ranks, *CASES)
    for log in logs:
        assert json.loads(log.splitlines()[-1])["done"] == CASES
