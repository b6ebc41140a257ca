"""vLLM-Ascend's model runner V1: its real classes around our updator and loader, over gloo."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

RELEASED, NEWEST = "0.23.0", "0.30.0rc2"
ALL = {
    RELEASED: [
        "NONE/0/planner",
        "NONE/1",
        "W8A8/0/multi",
        "W8A8/1/map",
        "W4A8/1",
        "MXFP4/0",
        "MXFP4/1",
        "MXFP8/0",
        "MXFP8/1/multi",
        "W4A8MXFP/0/refused",
        "W4A16/1/refused",
        "W4A8/0/refused",
    ],
    NEWEST: [
        "NONE/0/map",
        "NONE/1",
        "W8A8/0/multi",
        "W8A8/1",
        "W4A8/0",
        "W4A8/1",
        "W4A4MXFP/0",
        "W4A4MXFP/1",
        "W8A8MXFP/0",
        "W8A8MXFP/1",
        "W4A8MXFP/1/refused",
        "W8A8FP/0/refused",
    ],
}
"""Every quantisation that its table knows, with both modes of fused MC2; some that it refuses."""
FEW = ["W8A8/0/planner", "W4A8/1/map", "MXFP8/0/multi"]


@pytest.mark.parametrize(
    ("version", "ranks", "cases"),
    [(RELEASED, 2, ALL[RELEASED]), (RELEASED, 4, FEW), (NEWEST, 2, ALL[NEWEST])],
)
def test_experts_move_with_its_own_classes(source, run_ranks, version, ranks, cases):
    for log in run_ranks("v1_rank.py", source(version), version, ranks, *cases):
        assert json.loads(log.splitlines()[-1])["done"] == cases


@pytest.mark.parametrize("version", [RELEASED, NEWEST])
def test_no_quantisation_of_its_table_is_left_out(source, version):
    tree = parsed(source(version), "eplb/adaptor/vllm_adaptor.py")
    (table,) = (
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == TABLE
    )
    known = {
        f"{key.elts[0].attr}/{int(key.elts[1].value)}"  # type: ignore[attr-defined]
        for key in table.keys  # type: ignore[attr-defined]
    }
    moved = [case.split("/") for case in ALL[version] if "refused" not in case]
    assert known == {f"{name}/{fused}" for name, fused, *_ in moved}


TABLE = "EPLB_EXPERT_WEIGHT_NAMES"


def parsed(root, path):
    return ast.parse(Path(root, "vllm_ascend", path).read_text())


def methods(tree, name):
    """The methods of class `name`, by name."""
    (found,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    return {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)}


def calls(node, what):
    """Calls in `node` whose text ends with `what`, as text."""
    return [
        ast.unparse(call)
        for call in ast.walk(node)
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(what)
    ]


@pytest.mark.parametrize("version", [RELEASED, NEWEST])
class TestRunner:
    """What its runner does is what `v1_rank.NPUModelRunner` and `follow_runner` take it to do."""

    @pytest.fixture
    def runner(self, source, version):
        return methods(parsed(source(version), "worker/model_runner_v1.py"), "NPUModelRunner")

    def test_passes_are_between_forward_before_and_forward_end_but_of_pooling(self, runner):
        before = {name for name, node in runner.items() if calls(node, "forward_before")}
        after = {name for name, node in runner.items() if calls(node, "updator.forward_end")}
        assert before == {"execute_model", "_dummy_run"}
        assert after == {"execute_model", "sample_tokens", "_dummy_run"}
        for name in before:
            assert calls(runner[name], "forward_before") == ["self.eplb_updator.forward_before()"]
        (early,) = (  # of execute_model: the ranks of pipeline stages before the last
            node
            for node in ast.walk(runner["execute_model"])
            if isinstance(node, ast.If) and "is_last_rank" in ast.unparse(node.test)
            if calls(node, "updator.forward_end")
        )
        assert ast.unparse(early.test) == "not get_pp_group().is_last_rank"
        pooling = [  # such a pass ends without a word: refused
            node
            for node in ast.walk(runner["execute_model"])
            if isinstance(node, ast.If) and ast.unparse(node.test) == "self.is_pooling_model"
        ]
        assert any(isinstance(one, ast.Return) for node in pooling for one in ast.walk(node))
        assert not any(calls(node, "updator.forward_end") for node in pooling)

    def test_dummy_passes_are_told_by_their_method(self, runner):
        guards = [
            ast.unparse(node.test)
            for node in ast.walk(runner["_dummy_run"])
            if isinstance(node, ast.If) and calls(node, "updator.forward_before")
        ]
        assert guards == ["not is_profile and self.dynamic_eplb"]
        first = runner["execute_model"].args.args[1]
        assert first.arg == "scheduler_output"

    def test_the_updator_is_made_and_warmed_up_as_we_expect(self, runner):
        (made,) = calls(runner["__init__"], "EplbUpdator")
        assert made == (
            "EplbUpdator(eplb_config, self.eplb_loader, self.eplb_process, self.process)"
        )
        warmup = runner["eplb_warmup"]
        order = ("VllmEplbAdaptor", "set_adator", "set_adaptor", "warm_up_eplb")
        lines = [ast.unparse(warmup).index(call + "(") for call in order]
        assert lines == sorted(lines)
        profile = ast.unparse(runner["profile_run"])  # before any pass that could be captured
        assert profile.index("eplb_warmup()") < profile.index("_dummy_run(")

    def test_layers_count_and_route_as_we_expect(self, source, version):
        files = {
            RELEASED: ("fused_moe_0_23_0.py", "AscendFusedMoE"),
            NEWEST: ("routed_experts.py", "AscendRoutedExperts"),
        }
        file, name = files[version]
        found = methods(parsed(source(version), f"ops/fused_moe/{file}"), name)
        text = "\n".join(map(ast.unparse, found.values()))
        for used in ("self.num_iter", "self.moe_load.add_(", "self.moe_load.index_add_("):
            assert used in text, used
        assert "torch.remainder(self.load_counter, self.num_iter)" in text
        assert "return self.log2phy" in ast.unparse(found["get_log2phy_map"])


OLDER = """
import importlib.metadata, os
os.environ.update(EPLB_ENABLED="1")
entry = importlib.metadata.EntryPoint("ascend", "vllm_ascend:register", "vllm.platform_plugins")
from flash_eplb.eplb import ascend, plugin
ascend.entry_points = lambda group: [entry]
from vllm.distributed.eplb.eplb_state import EplbState
from vllm.v1.worker.worker_base import WorkerBase
del EplbState.prepare_forward
plugin.register()
print(hasattr(WorkerBase.__init__, "_flash_eplb"), "__new__" in vars(EplbState))
"""


def test_runner_v1_is_hooked_though_vllm_has_no_eplb_that_we_know():
    # The release is for a vLLM whose EplbState has no prepare_forward.
    done = subprocess.run(
        [sys.executable, "-c", OLDER], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "True False"
    assert "has no prepare_forward, so vLLM-Ascend is balanced on model runner V1" in done.stderr
    assert "flash_eplb is off" not in done.stderr
