import importlib
import logging
import os
import subprocess
import sys
import types
from importlib.metadata import EntryPoint

import pytest

from flash_eplb.eplb import plugin

HEAVY = """
import sys
from flash_eplb.eplb.plugin import register

register()
heavy = {"torch", "vllm", "numba", "numpy"} & set(sys.modules)
print(sorted(heavy))
"""


def run(code, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.upper().startswith("EPLB_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"EPLB_ENABLED": "0"},
        {"EPLB_SESSION": "a", "EPLB_CPU_PATCHES": "false", "EPLB_SPAWN_PLANNER": "1"},
        {"EPLB_ENABLED": "perhaps"},
    ],
)
def test_nothing_heavy_is_imported_unless_it_is_enabled(variables):
    result = run(HEAVY, **variables)
    assert result.stdout == "[]\n"
    assert bool(result.stderr) == ("perhaps" in variables.values())


def test_all_wrong_values_are_logged_and_nothing_is_raised():
    result = run(HEAVY, EPLB_ENABLED="1", EPLB_RING_STEPS="7", EPLB_VERIFY="maybe")
    assert result.stdout == "[]\n"
    assert "ERROR flash_eplb.worker" in result.stderr
    assert "flash_eplb is off: wrong settings:" in result.stderr
    assert "  EPLB_RING_STEPS='7': allowed is an integer from 8 to 65536" in result.stderr
    assert "  EPLB_VERIFY='maybe': allowed is 0 or 1" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("others", [{}, {"EPLB_VERIFY": "maybe", "eplb_session": "a"}])
def test_a_variable_that_is_misspelt_is_named_although_nothing_is_enabled(others):
    result = run(HEAVY, EPLB_ENABLE="1", EPLB_WINDOWS="3", EPLB_SESSION="a", **others)
    assert result.stdout == "[]\n"
    assert "EPLB_ENABLE, EPLB_WINDOWS: no setting of flash_eplb, misspelt?" in result.stderr
    assert ("are one setting" in result.stderr) == bool(others)
    assert ("flash_eplb is off: wrong settings" in result.stderr) == bool(others)


@pytest.fixture
def hooks(environment):
    """Stands in for the modules that touch vLLM: what was installed, in order."""
    done = []
    environment.setenv(plugin._RAY_COPIES, "")  # which is put back afterwards
    state = types.ModuleType("flash_eplb.eplb.vllm_state")
    state.install = lambda config, is_ascend: done.append(("state", config.session))
    patches = types.ModuleType("flash_eplb.loaders.cpu_patches")
    patches.install = lambda: done.append(("patches",))
    for module in (state, patches):
        package, _, name = module.__name__.rpartition(".")
        environment.setitem(sys.modules, module.__name__, module)
        environment.setattr(importlib.import_module(package), name, module, raising=False)
    ascend = "flash_eplb.eplb.ascend.install"
    environment.setattr(ascend, lambda config: done.append(("ascend", config.session)))
    environment.setattr(plugin, "_sweep_at_exit", lambda session: done.append(("sweep", session)))
    environment.setattr("flash_eplb.eplb.logs.configure", lambda level: done.append(("log", level)))
    done.append(state)
    return done


@pytest.mark.parametrize(
    ("variables", "installed"),
    [
        ({}, []),
        ({"EPLB_ENABLED": "0"}, []),
        ({"EPLB_CPU_PATCHES": "1"}, [("patches",)]),
        ({"EPLB_CPU_PATCHES": "1", "EPLB_VERIFY": "maybe"}, [("patches",), ("log", "INFO")]),
        ({"EPLB_CPU_PATCHES": "perhaps"}, [("log", "INFO")]),
        (
            {"EPLB_ENABLED": "1", "EPLB_SESSION": "a", "EPLB_LOG_LEVEL": "debug"},
            [("log", "DEBUG"), ("state", "a"), ("sweep", "a")],
        ),
        (
            {"EPLB_ENABLED": "1", "EPLB_CPU_PATCHES": "1"},
            [
                ("patches",),
                ("log", "INFO"),
                ("state", "default"),
                ("sweep", "default"),
            ],
        ),
    ],
)
def test_what_is_asked_for_is_installed(hooks, environment, variables, installed):
    for name, value in variables.items():
        environment.setenv(name, value)
    plugin.register()
    assert hooks[1:] == installed


@pytest.mark.parametrize("before", [None, "MY_, EPLB_", "MY_"])
def test_workers_that_ray_starts_get_our_variables(hooks, environment, before):
    """They inherit nothing, and vLLM copies variables of the prefixes that it knows."""
    from vllm.ray.ray_env import get_env_vars_to_copy

    environment.delenv(plugin._RAY_COPIES)
    if before is not None:
        environment.setenv(plugin._RAY_COPIES, before)
    environment.setenv("EPLB_ENABLED", "1")
    environment.setenv("EPLB_SESSION", "a")
    environment.setenv("MY_NAME", "me")
    plugin.register()
    names = {"EPLB_ENABLED", "EPLB_SESSION", *(["MY_NAME"] if before else [])}
    assert names <= get_env_vars_to_copy()
    assert os.environ[plugin._RAY_COPIES].count("EPLB_") == 1


def test_a_vllm_that_does_not_fit_is_logged_and_nothing_is_raised(hooks, environment, caplog):
    def refuse(config, is_ascend):
        raise RuntimeError("vLLM's EplbState has no step")

    hooks[0].install = refuse
    environment.setenv("EPLB_ENABLED", "1")
    environment.setattr(logging.getLogger("flash_eplb"), "propagate", True)
    plugin.register()
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert record.getMessage().startswith("flash_eplb is off: it does not fit this vLLM")
    assert "EplbState has no step" in str(record.exc_info[1])
    assert ("sweep", "default") not in hooks


def test_patches_that_do_not_fit_are_logged_and_the_rest_is_installed(hooks, environment, caplog):
    def refuse():
        raise AttributeError("vLLM has no such kernel")

    environment.setattr(sys.modules["flash_eplb.loaders.cpu_patches"], "install", refuse)
    environment.setattr(logging.getLogger("flash_eplb"), "propagate", True)
    environment.setenv("EPLB_CPU_PATCHES", "1")
    environment.setenv("EPLB_ENABLED", "1")
    plugin.register()
    (record,) = caplog.records
    assert record.getMessage().startswith("EPLB_CPU_PATCHES: the patches do not fit this vLLM")
    assert ("state", "default") in hooks


@pytest.mark.parametrize("listed", ["flash_eplb", "flash_eplb,ascend"])
def test_a_list_of_plug_ins_that_leaves_ascend_out_is_logged(hooks, environment, caplog, listed):
    installed = [EntryPoint("ascend", "vllm_ascend:register", "vllm.platform_plugins")]
    environment.setattr("flash_eplb.eplb.ascend.entry_points", lambda group: installed)
    environment.setattr(logging.getLogger("flash_eplb"), "propagate", True)
    environment.setenv("EPLB_ENABLED", "1")
    environment.setenv("VLLM_PLUGINS", listed)
    plugin.register()
    left_out = "VLLM_PLUGINS=flash_eplb leaves out 'ascend', the platform plug-in of vLLM-Ascend"
    assert (left_out in caplog.text) == (listed == "flash_eplb")
    assert hooks[2:] == [("ascend", "default"), ("state", "default"), ("sweep", "default")]
