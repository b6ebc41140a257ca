"""vLLM-Ascend's model runner V2: its real controller, state and routing, around ours, over gloo."""

import json

import pytest

NEWEST = "0.30.0rc2"
CASES = {2: ["rows/planner", "lists", "mixed"], 4: ["mixed/planner", "rows"]}


@pytest.mark.parametrize("ranks", [2, 4])
def test_experts_and_routing_tables_change_under_its_own_state(source, run_ranks, ranks):
    logs = run_ranks("v2_rank.py", source(NEWEST), NEWEST, ranks, *CASES[ranks])
    for log in logs:
        assert json.loads(log.splitlines()[-1])["done"] == CASES[ranks]
