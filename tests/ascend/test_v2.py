"""vLLM-Ascend's model runner V2: its real controller, state and routing, around ours, over gloo."""

import ast
import json
from pathlib import Path

NEWEST = "0.30.0rc2"
CASES = ["rows/planner", "lists", "mixed/planner"]


def test_experts_and_routing_tables_change_under_its_own_state(source, run_ranks):
    for log in run_ranks("v2_rank.py", source(NEWEST), NEWEST, 4, *CASES):
        assert json.loads(log.splitlines()[-1])["done"] == CASES


def test_its_runner_steps_as_ours_in_the_scenario_does(source):
    path = Path(source(NEWEST), "vllm_ascend/worker/v2/model_runner.py")
    (runner,) = (
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "NPUModelRunner"
    )
    assert [ast.unparse(base) for base in runner.bases] == ["GPUModelRunner"]
    methods = {node.name: node for node in runner.body if isinstance(node, ast.FunctionDef)}
    decorated = {
        name: [ast.unparse(one) for one in node.decorator_list if "eplb" in ast.unparse(one)]
        for name, node in methods.items()
    }
    assert decorated["_dummy_run"] == ["step_eplb_after(is_dummy=True)"]
    assert not decorated["sample_tokens"]  # vLLM's own, which it calls, is
    assert "super().sample_tokens(" in ast.unparse(methods["sample_tokens"])
    dummy = ast.unparse(methods["_dummy_run"])
    assert "super()._dummy_run(" in dummy
    assert "skip_eplb=True" in dummy
    assert "AscendEPLBController(" in ast.unparse(methods["__init__"])
