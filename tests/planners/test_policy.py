"""The choice of a policy by name, and policies of entry points."""

import logging
import subprocess
import sys

import numpy as np
import pytest

from flash_eplb.planners.deepseek import DeepSeek
from flash_eplb.planners.policy import (
    BUILT_IN,
    DEFAULT,
    GROUP,
    Choice,
    PolicyError,
    choose_policy,
    known_policies,
    make_policy,
)

USERS = """
made = []

class Mine:
    def __init__(self, *arguments, **options):
        made.append((arguments, options))

    def plan(self, heat, placement):
        return placement

def fails(ranks, slots_per_rank, ranks_per_node):
    raise RuntimeError("only for 3 ranks")

def exits(ranks, slots_per_rank, ranks_per_node):
    raise SystemExit(3)

def gives_nothing(ranks, slots_per_rank, ranks_per_node):
    return None

constant = 7
warmed = []

def warmup():
    warmed.append(1)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """`install(distribution, module, code, names)`: a package with entry points name -> object."""
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = set()

    def install_one(distribution, module, code, names):
        (tmp_path / f"{module}.py").write_text(code)
        folder = tmp_path / f"{distribution.replace('-', '_')}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"
        )
        lines = [f"{name} = {module}:{attribute}" for name, attribute in names.items()]
        (folder / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))
        modules.add(module)

    yield install_one
    for module in modules:
        sys.modules.pop(module, None)


def refusal(name, *shape):
    with pytest.raises(PolicyError) as error:
        make_policy(name, *(shape or (2, 4, 2)))
    return str(error.value)


@pytest.mark.parametrize("name", BUILT_IN)
def test_each_policy_of_ours_is_made_by_its_name_and_plans(name):
    policy = make_policy(name, 2, 5, 2)
    heat = np.array([[[1, 1, 90, 80, 70, 1, 1, 1]]])
    placement = (np.arange(10) % 8).reshape(1, 2, 5)
    plan = policy.plan(heat, placement)
    assert (plan.before == placement).all()
    choose_policy(name).warm_up()


def test_the_default_is_one_of_ours():
    assert DEFAULT == "flashlb"
    assert known_policies() == ["flashlb", "static", "random", "deepseek", "swap"]


def test_a_policy_gets_the_node_size_and_the_options_that_it_takes():
    policy = make_policy("deepseek", 4, 2, 2, min_gain=0.5, max_moves=7)
    assert isinstance(policy, DeepSeek)
    assert (policy.nodes, policy.min_gain) == (2, 0.5)
    assert make_policy("swap", 4, 2, None, max_moves=7).max_moves == 7
    with pytest.raises(
        PolicyError, match=r"'swap' cannot be made for 4 ranks x 2 .*max_moves is -1"
    ):
        make_policy("swap", 4, 2, None, max_moves=-1)


def test_an_unknown_name_is_refused_with_all_that_are_known(install):
    install("my-package", "mine_1", USERS, {"zeta": "Mine", "alpha": "Mine"})
    assert refusal("flashbl") == (
        "EPLB_POLICY='flashbl' names no policy; known are flashlb, static, random, deepseek, swap, "
        "alpha, zeta (your own needs an entry point of the group flash_eplb.policies)"
    )
    assert known_policies()[len(BUILT_IN) :] == ["alpha", "zeta"]


def test_a_policy_of_an_entry_point_gets_the_shape_and_no_options(install):
    install("my-package", "mine_2", USERS, {"mine": "Mine"})
    policy = make_policy("mine", 8, 9, 4, min_gain=0.5)
    module = sys.modules["mine_2"]
    assert isinstance(policy, module.Mine)
    assert module.made == [((8, 9, 4), {})]
    choice = choose_policy("mine")
    assert choice == Choice("mine", module.Mine, "mine_2", frozenset())
    choice.warm_up()
    assert module.warmed == [1]


def test_ours_win_over_an_entry_point_of_the_same_name(install, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("flash_eplb"), "propagate", True)
    install("my-package", "mine_3", USERS, {"swap": "Mine"})
    assert type(make_policy("swap", 2, 4, None)).__module__ == "flash_eplb.planners.swap"
    assert "mine_3" not in sys.modules
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "the entry point swap = mine_3:Mine of the package my-package is ignored: the name is one "
        "of our own policies"
    )
    assert known_policies() == list(BUILT_IN)


def test_two_packages_with_one_name_are_refused(install):
    install("one", "mine_4", USERS, {"mine": "Mine"})
    install("two", "mine_5", USERS, {"mine": "Mine"})
    text = refusal("mine")
    assert text.startswith("EPLB_POLICY='mine' names several: the entry point mine = mine_")
    assert "of the package one" in text
    assert "of the package two; uninstall" in text or "of the package one; uninstall" in text


@pytest.mark.parametrize(
    ("code", "attribute", "reason"),
    [
        ("import no_such_module", "Mine", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise RuntimeError('no license')", "Mine", "RuntimeError: no license"),
        ("raise SystemExit", "Mine", "SystemExit"),
        ("def (", "Mine", "SyntaxError: "),
        ("", "Mine", "AttributeError: module 'mine_6' has no attribute 'Mine'"),
    ],
)
def test_an_entry_point_that_does_not_load_is_one_error(install, code, attribute, reason):
    install("my-package", "mine_6", code, {"mine": attribute})
    text = refusal("mine")
    assert text.startswith(
        "EPLB_POLICY='mine': the entry point mine = mine_6:Mine of the package my-package does not "
        f"load: {reason}"
    )
    assert "\n" not in text


@pytest.mark.parametrize(
    ("attribute", "text"),
    [
        (
            "constant",
            "EPLB_POLICY='mine': the entry point mine = mine_7:constant of the package my-package "
            "is of type int; it must be a callable (ranks, slots_per_rank, ranks_per_node) that "
            "gives a policy",
        ),
        (
            "fails",
            "EPLB_POLICY='mine' cannot be made for 2 ranks x 4 slots: RuntimeError: only for 3 "
            "ranks",
        ),
        ("exits", "EPLB_POLICY='mine' cannot be made for 2 ranks x 4 slots: SystemExit: 3"),
        (
            "gives_nothing",
            "EPLB_POLICY='mine' gives an object of type NoneType, which has no method plan(heat, "
            "placement)",
        ),
    ],
)
def test_an_entry_point_that_gives_no_policy_is_one_error(install, attribute, text):
    install("my-package", "mine_7", USERS, {"mine": attribute})
    assert refusal("mine") == text


def test_a_warmup_that_fails_is_one_error(install):
    code = USERS + "    raise OSError('the cache is full')\n"
    install("my-package", "mine_8", code, {"mine": "Mine"})
    with pytest.raises(PolicyError) as error:
        choose_policy("mine").warm_up()
    assert str(error.value) == (
        "EPLB_POLICY='mine' cannot be used: mine_8.warmup() failed with OSError: the cache is full"
    )


def test_a_module_without_warmup_has_nothing_to_compile(install):
    install("my-package", "mine_9", "class Mine: ...", {"mine": "Mine"})
    choose_policy("mine").warm_up()


def test_nothing_heavy_is_imported_before_a_policy_is_made():
    script = """
import sys
from flash_eplb.planners.policy import choose_policy, known_policies, PolicyError
known_policies()
try:
    choose_policy("no-such")
except PolicyError:
    pass
assert not {"numpy", "numba", "torch"} & sys.modules.keys()
choose_policy("static")
assert "numba" in sys.modules
assert not [name for name in sys.modules if name.endswith(("deepseek", "swap", "flashlb"))]
"""
    subprocess.run([sys.executable, "-c", script], check=True)
