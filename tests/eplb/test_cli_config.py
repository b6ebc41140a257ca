import re

import pytest
from typer.testing import CliRunner

from flash_eplb.eplb.cli import app
from flash_eplb.eplb.config import Config

pytestmark = pytest.mark.usefixtures("environment")


def eplb(*arguments):
    return CliRunner().invoke(app, arguments)


def test_config_shows_every_setting_with_its_value_and_source(environment):
    environment.setenv("EPLB_RING_STEPS", "12345")
    environment.setenv("EPLB_SESSIN", "a")
    result = eplb("config")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    for name in Config.model_fields:
        assert sum(f" EPLB_{name.upper()} " in line for line in lines) == 1
    (ring,) = (line for line in lines if " EPLB_RING_STEPS " in line)
    assert " 12345 " in ring
    assert "environment" in ring
    (verify,) = (line for line in lines if " EPLB_VERIFY " in line)
    assert " 1 " in verify
    assert " default " in verify
    assert result.stderr == "eplb: EPLB_SESSIN is no setting of ours: misspelt?\n"


def test_config_shows_all_of_a_long_path(environment):
    path = "/recordings" * 12
    environment.setenv("EPLB_RECORD", path)
    shown = [line.split("│") for line in eplb("config").stdout.splitlines() if "│" in line]
    assert path in "".join(cells[2].strip() for cells in shown)


def test_config_shows_values_where_the_terminal_is_narrow(environment):
    environment.setenv("COLUMNS", "40")
    environment.setenv("FORCE_COLOR", "1")  # rich takes what it writes to for a terminal
    out = re.sub("\x1b[^m]*m", "", eplb("config").stdout)
    (ring,) = (line for line in out.splitlines() if " EPLB_RING_STEPS " in line)
    assert [cell.strip() for cell in ring.split("│")[2:4]] == ["256", "default"]


def test_config_says_which_of_two_spellings_counts(environment):
    environment.setenv("EPLB_EFFORT", "fast")
    environment.setenv("eplb_effort", "thorough")
    result = eplb("config")
    assert result.stderr == (
        "eplb: EPLB_EFFORT and eplb_effort are one setting: eplb_effort counts; unset the other\n"
    )
    (effort,) = (line for line in result.stdout.splitlines() if " EPLB_EFFORT " in line)
    assert " thorough " in effort


@pytest.mark.parametrize("value", ["2", "0"])
@pytest.mark.parametrize(
    "command", [["replay", "no-file"], ["plan", "no-file"], ["status"], ["stress", "--scenario=x"]]
)
def test_every_command_that_obeys_settings_names_a_misspelt_one(command, value, environment):
    environment.setenv("EPLB_WINDOW_EPISODE", "8")
    environment.setenv("EPLB_MIN_EPISODES", value)
    said = eplb(*command).stderr.splitlines()
    assert said[0] == "eplb: EPLB_WINDOW_EPISODE is no setting of ours: misspelt?"


@pytest.mark.parametrize(
    "command", [["config"], ["status"], ["planner"], ["clean", "--session", "a"]]
)
def test_wrong_values_end_a_command_with_2_and_all_of_them(command, environment):
    environment.setenv("EPLB_RING_STEPS", "7")
    environment.setenv("EPLB_MIN_GAIN", "much")
    environment.setenv("EPLB_VERIFY", "maybe")
    result = eplb(*command)
    assert result.exit_code == 2
    assert result.stdout == ""
    first, *lines = result.stderr.splitlines()
    assert first == "eplb: wrong settings:"
    assert sorted(lines) == [
        "  EPLB_MIN_GAIN='much': allowed is a number from 0 to 100",
        "  EPLB_RING_STEPS='7': allowed is an integer from 8 to 65536",
        "  EPLB_VERIFY='maybe': allowed is 0 or 1",
    ]


def test_config_says_that_a_policy_is_not_there(environment):
    environment.setenv("EPLB_POLICY", "flashbl")
    result = eplb("config")
    assert result.exit_code == 0
    assert result.stderr == "eplb: EPLB_POLICY='flashbl' names no policy: misspelt?\n"
