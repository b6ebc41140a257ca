import pytest

from flash_eplb.eplb.config import (
    Config,
    ConfigError,
    allowed,
    load_config,
    source,
    twice_set,
    unknown_variables,
)

DEFAULTS = {
    "enabled": False,
    "session": "default",
    "spawn_planner": False,
    "cpu_patches": False,
    "policy": "flashlb",
    "episode_steps": 16,
    "heat_phase": "all",
    "window_episodes": 64,
    "min_episodes": 8,
    "plan_interval": 8,
    "min_excess": 0.02,
    "min_gain": 0.01,
    "max_moves": 0,
    "max_layers": 0,
    "effort": "balanced",
    "routing": "uniform",
    "planner_threads": 1,
    "ranks_per_node": 0,
    "staging_rows": 0,
    "vote_steps": 4,
    "plan_timeout_steps": 2000,
    "transfer_timeout": 60.0,
    "transport": "auto",
    "verify": True,
    "patrol_steps": 64,
    "ring_steps": 256,
    "initial_placement": "",
    "save_placement": "",
    "record": "",
    "record_mb": 1024,
    "log_level": "INFO",
}
RANGES = {
    "episode_steps": (1, 4096),
    "window_episodes": (2, 1024),
    "min_episodes": (2, 1024),
    "plan_interval": (1, 4096),
    "max_moves": (0, 10**6),
    "max_layers": (0, 10**6),
    "planner_threads": (1, 256),
    "ranks_per_node": (0, 4096),
    "staging_rows": (0, 4096),
    "vote_steps": (1, 1024),
    "plan_timeout_steps": (1, 10**7),
    "patrol_steps": (0, 10**6),
    "ring_steps": (8, 65536),
    "record_mb": (1, 10**7),
}
SWITCHES = ["enabled", "spawn_planner", "cpu_patches", "verify"]

pytestmark = pytest.mark.usefixtures("environment")


def variable(name):
    return f"EPLB_{name.upper()}"


def refusal(**overrides):
    """The lines after "wrong settings:"."""
    with pytest.raises(ConfigError) as error:
        load_config(**overrides)
    first, *lines = str(error.value).splitlines()
    assert first == "wrong settings:"
    return lines


def test_the_defaults():
    assert load_config().model_dump() == DEFAULTS


def test_every_setting_has_a_meaning_and_says_what_is_allowed():
    for name, field in Config.model_fields.items():
        assert field.description
        assert allowed(name)


@pytest.mark.parametrize("name", RANGES)
def test_the_ends_of_a_range_are_allowed_and_what_is_beyond_is_not(name, environment):
    low, high = RANGES[name]
    assert allowed(name) == f"an integer from {low} to {high}"
    for value in (low, high):
        environment.setenv(variable(name), str(value))
        assert getattr(load_config(), name) == value
    for value in (low - 1, high + 1, "", "x", "1.5"):
        environment.setenv(variable(name), str(value))
        assert refusal() == [
            f"  {variable(name)}={str(value)!r}: allowed is an integer from {low} to {high}"
        ]


@pytest.mark.parametrize("name", ["min_excess", "min_gain"])
def test_a_gain_is_a_number_from_0_to_100(name, environment):
    for value in ("0", "0.25", "1e2"):
        environment.setenv(variable(name), value)
        assert getattr(load_config(), name) == float(value)
    for value in ("-0.001", "100.1", "nan", "inf", "x", ""):
        environment.setenv(variable(name), value)
        assert refusal() == [f"  {variable(name)}={value!r}: allowed is a number from 0 to 100"]


def test_a_timeout_is_a_millisecond_at_least(environment):
    """gloo counts milliseconds, and without any it waits for ever."""
    environment.setenv("EPLB_TRANSFER_TIMEOUT", "0.1")
    assert load_config().transfer_timeout == 0.1
    for value in ("0", "0.0009", "-1", "3601", "nan"):
        environment.setenv("EPLB_TRANSFER_TIMEOUT", value)
        assert refusal() == [
            f"  EPLB_TRANSFER_TIMEOUT={value!r}: allowed is a number from 0.001 to 3600"
        ]


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch(name, environment):
    for value in ("1", "true", "ON", "yes"):
        environment.setenv(variable(name), value)
        assert getattr(load_config(), name) is True
    for value in ("0", "false", "Off", "no"):
        environment.setenv(variable(name), value)
        assert getattr(load_config(), name) is False
    for value in ("", "2", "maybe"):
        environment.setenv(variable(name), value)
        assert refusal() == [f"  {variable(name)}={value!r}: allowed is 0 or 1"]


def test_a_log_level_in_any_case(environment):
    environment.setenv("EPLB_LOG_LEVEL", "warning")
    assert load_config().log_level == "WARNING"
    environment.setenv("EPLB_LOG_LEVEL", "loud")
    (line,) = refusal()
    assert line == "  EPLB_LOG_LEVEL='loud': allowed is DEBUG, INFO, WARNING or ERROR"


def test_a_policy_is_a_name_of_ours_or_of_an_entry_point(environment):
    for value in ("swap", "one-swap", "My.Policy_2"):
        environment.setenv("EPLB_POLICY", value)
        assert load_config().policy == value
    for value in ("", "?", "a b", "-a", "a:b", "a\n"):
        environment.setenv("EPLB_POLICY", value)
        assert refusal() == [
            f"  EPLB_POLICY={value!r}: allowed is flashlb, static, random, deepseek, swap or the "
            "name of an entry point of flash_eplb.policies"
        ]


@pytest.mark.parametrize("name", ["initial_placement", "save_placement", "record"])
def test_a_path_may_begin_with_a_tilde_that_no_shell_has_replaced(name, environment):
    environment.setenv("HOME", "/home/someone")
    for value, path in (("~/x", "/home/someone/x"), ("a~/x", "a~/x"), ("/x/~", "/x/~"), ("", "")):
        environment.setenv(variable(name), value)
        assert getattr(load_config(), name) == path


def test_all_wrong_values_are_reported_together(environment):
    wrong = dict.fromkeys(
        DEFAULTS.keys() - {"record", "initial_placement", "save_placement"}, "?"
    )  # paths may be anything
    for name, value in wrong.items():
        environment.setenv(variable(name), value)
    lines = refusal()
    assert len(lines) == len(wrong)
    for name in wrong:
        assert f"  {variable(name)}='?': allowed is {allowed(name)}" in lines


def test_good_values_do_not_hide_wrong_ones(environment):
    environment.setenv("EPLB_ENABLED", "1")
    environment.setenv("EPLB_RING_STEPS", "7")
    environment.setenv("EPLB_SESSION", "a b")
    assert sorted(refusal()) == [
        "  EPLB_RING_STEPS='7': allowed is an integer from 8 to 65536",
        "  EPLB_SESSION='a b': allowed is 1 to 32 letters, digits, '-' or '_'",
    ]


def test_an_override_wins_unless_it_is_none(environment):
    environment.setenv("EPLB_SESSION", "from-environment")
    assert load_config(session=None).session == "from-environment"
    assert load_config(session="given").session == "given"
    environment.setenv("EPLB_SESSION", "not good")
    assert load_config(session="given").session == "given"


def test_a_wrong_override_is_reported_by_its_variable():
    assert refusal(session="a/b") == [
        "  EPLB_SESSION='a/b': allowed is 1 to 32 letters, digits, '-' or '_'"
    ]


def test_where_a_value_comes_from(environment):
    assert source("session") == "default"
    environment.setenv("EPLB_SESSION", "a")
    assert source("session") == "environment (EPLB_SESSION)"
    environment.setenv("eplb_verify", "0")
    assert source("verify") == "environment (eplb_verify)"
    assert load_config().verify is False


@pytest.mark.parametrize("names", [("EPLB_EFFORT", "eplb_effort"), ("eplb_effort", "EPLB_EFFORT")])
def test_of_two_spellings_the_one_that_counts_is_named(environment, names):
    assert twice_set() == []
    for name, value in zip(names, ("fast", "thorough"), strict=True):
        environment.setenv(name, value)
    assert load_config().effort == "thorough"
    assert source("effort") == f"environment ({names[1]})"
    assert twice_set() == [f"{names[0]} and {names[1]} are one setting: {names[1]} counts"]


def test_misspelt_variables_are_found(environment):
    assert unknown_variables() == []
    environment.setenv("EPLB_RING_STEPS", "8")
    environment.setenv("EPLB_WINDOWS", "1")
    environment.setenv("eplb_enable", "1")
    environment.setenv("NOT_EPLB_ENABLE", "1")
    assert unknown_variables() == ["EPLB_WINDOWS", "eplb_enable"]
    load_config()


def test_settings_cannot_be_changed():
    config = load_config()
    with pytest.raises(ValueError, match="frozen"):
        config.session = "b"
