import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "planners"))
from recordings import FIRST
from recordings import record as write

from flash_eplb.eplb.cli import app
from flash_eplb.eplb.cli_replay import _show
from flash_eplb.planners import recorder
from flash_eplb.planners.par import episode_par
from flash_eplb.planners.recording import Recording
from flash_eplb.planners.replay import linear_placement

pytestmark = pytest.mark.usefixtures("environment")

SHAPE = ["--ranks", "4", "--slots-per-rank", "5"]


def replay(*arguments):
    return CliRunner().invoke(app, ["replay", *map(str, arguments)])


def refused(*arguments):
    """The sentence with which a call is refused."""
    result = replay(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def table(text):
    """The cells of each policy's row."""
    rows = re.search(r"─ *\n(.*?)\n *\n", text, re.DOTALL)[1].splitlines()
    return {row.split()[0]: row.split()[1:] for row in rows}


@pytest.fixture
def heat(tmp_path):
    """A file of heat that moves from one topic to another."""
    random = np.random.default_rng(3)
    topics = random.permuted(np.tile(np.arange(1, 17.0) ** -1.1, (2, 2, 1)), axis=2)
    part = np.linspace(0, 1, 640)[:, None, None]
    path = tmp_path / "heat.npy"
    np.save(path, random.poisson(300 * ((1 - part) * topics[0] + part * topics[1])))
    return path


def test_policies_are_compared_on_a_file(heat, tmp_path):
    target = tmp_path / "figures.json"
    names = ["flashlb", "static", "swap"]
    policies = [argument for name in names for argument in ("--policy", name)]
    result = replay(heat, *SHAPE, *policies, "--json", target)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    rows = table(result.stdout)
    assert list(rows) == names
    figures = json.loads(target.read_text())
    found = figures["policies"]
    assert list(found) == names
    assert "No policy has planned" not in result.stdout
    start = linear_placement(2, 16, 4, 5)
    expected = episode_par(np.load(heat), start).mean()
    assert found["static"]["step_par_mean"] == pytest.approx(expected)
    assert rows["static"][0] == f"{expected:.3f}"
    assert rows["static"][4:] == ["0", "0", "0.0%", rows["static"][7], "+0.0%"]
    assert found["flashlb"]["step_par_mean"] < expected - 0.1
    over_time = {name: one["episode_par_over_time"] for name, one in found.items()}
    assert {len(points) for points in over_time.values()} == {40}
    assert np.mean(over_time["static"]) == pytest.approx(found["static"]["episode_par_mean"])
    assert over_time["flashlb"][:8] == over_time["static"][:8]  # before the first plan
    assert over_time["flashlb"][-1] < over_time["static"][-1]
    assert len(found["static"]["step_par_over_time"]) == 240
    highest = max(map(max, over_time.values()))
    assert f"PAR of episodes over time; a full block is {highest:.3f}" in result.stdout
    strips = dict(re.findall(r"^  (\w+) +([▁-█]{40})$", result.stdout, re.MULTILINE))
    assert list(strips) == names
    assert "█" in strips["static"]
    assert found["flashlb"]["step_time"] == pytest.approx(
        0.4 + 0.6 * found["flashlb"]["peak"] / found["static"]["peak"]
    )
    assert rows["flashlb"][8] == f"{found['flashlb']['step_time'] - 1:+.1%}"
    assert found["flashlb"]["plans"] >= 1
    assert (figures["delay"], figures["round_steps"], figures["staging_rows"]) == (16, 8, 8)
    assert sorted(os.listdir(tmp_path)) == ["figures.json", "heat.npy"]
    text = " ".join(result.stdout.split())
    assert "2 layers, 16 experts on 4 ranks x 5 slots, starting from vLLM's placement" in text
    assert "60% of a step under the placement at the start is taken to be MoE" in text


def test_without_names_the_policy_of_the_settings_and_static_are_compared(heat, environment):
    environment.setenv("EPLB_POLICY", "swap")
    assert list(table(replay(heat, *SHAPE).stdout)) == ["swap", "static"]


def test_time_is_relative_to_static_though_it_is_not_named(heat, tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert replay(heat, *SHAPE, "--policy", "swap", "--json", alone).exit_code == 0
    assert (
        replay(heat, *SHAPE, "--json", both, "--policy", "static", "--policy", "swap").exit_code
        == 0
    )
    found = [json.loads(path.read_text())["policies"]["swap"] for path in (alone, both)]
    assert found[0]["step_time"] == found[1]["step_time"] < 1


@pytest.mark.parametrize("columns", [30, 80])
def test_no_figure_is_cut_where_the_terminal_is_narrow(heat, environment, columns):
    wide = replay(heat, *SHAPE, "--policy", "static").stdout
    environment.setenv("COLUMNS", str(columns))
    environment.setenv("FORCE_COLOR", "1")  # rich takes what it writes to for a terminal
    found = re.sub("\x1b[^m]*m", "", replay(heat, *SHAPE, "--policy", "static").stdout)
    assert table(found)["static"][:7] == table(wide)["static"][:7]  # then comes planning time
    assert table(found)["static"][-1] == "+0.0%"
    assert max(map(len, found.split("PAR of episodes over")[0].splitlines())) <= 80


def test_a_long_name_of_a_policy_and_large_figures_fit_80_columns(capsys, environment):
    figures = {
        "step_par": (1.234, 1.567),
        "episode_par": (1.234, 1.567),
        "plans": 1234,
        "refused": 123,
        "moves": 1234567,
        "moved_per_plan": 1.0,
        "planning_ms": (12345.6, 20000.0),
        "episode_par_over_time": [1.1, 1.2],
    }
    name = "our-company.balance_by_cost-v2"
    environment.setenv("COLUMNS", "80")
    environment.setenv("FORCE_COLOR", "1")
    _show({name: SimpleNamespace(**figures)}, {name: 0.5})
    found = re.sub("\x1b[^m]*m", "", capsys.readouterr().out)
    assert max(map(len, found.splitlines())) <= 80
    assert "…" not in found
    assert re.search(r" 1234 +1234567 +100.0% +12345.6 +-50.0% *\n", found)


def test_an_output_that_cannot_show_all_signs_shows_the_rest(heat, tmp_path):
    command = [sys.executable, "-m", "flash_eplb.eplb.cli", "replay", heat, *SHAPE, "--json", "x"]
    variables = os.environ | {"PYTHONIOENCODING": "latin-1"}
    found = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, check=True)
    assert "PAR of episodes over time" in found.stdout.decode("latin-1")
    assert (tmp_path / "x").exists()


def test_the_settings_are_obeyed(heat, tmp_path, environment):
    environment.setenv("EPLB_EPISODE_STEPS", "64")
    environment.setenv("EPLB_STAGING_ROWS", "3")
    environment.setenv("EPLB_MIN_GAIN", "100")
    result = replay(heat, *SHAPE, "--policy", "swap", "--json", tmp_path / "x")
    assert result.exit_code == 0
    assert "static" not in result.stderr  # which is there unasked for
    figures = json.loads((tmp_path / "x").read_text())
    assert figures["policies"]["swap"]["episodes"] == 10
    assert figures["policies"]["swap"]["plans"] == 0
    assert figures["staging_rows"] == 3
    result = replay(heat, *SHAPE, "--policy", "static")
    assert result.stderr == "eplb: EPLB_MIN_GAIN does nothing with --policy static\n"


def test_a_recording_is_replayed_from_its_first_placement(tmp_path, environment):
    environment.setattr(recorder, "CHUNK_STEPS", 10)
    environment.setenv("EPLB_EPISODE_STEPS", "4")
    folder = tmp_path / "recording"
    write(folder, 40)
    result = replay(folder, "--policy", "static", "--json", tmp_path / "x")
    assert result.exit_code == 0, result.stderr
    figures = json.loads((tmp_path / "x").read_text())
    steps = np.array([counts.heat for counts in Recording(folder).counts()])
    static = figures["policies"]["static"]
    assert static["step_par_mean"] == pytest.approx(episode_par(steps, FIRST).mean())
    assert static["episodes"] == 10
    assert "from the first recorded placement" in " ".join(result.stdout.split())
    (folder / "000002.npz").unlink()
    result = replay(folder, "--policy", "static", "--ranks", 3, "--slots-per-rank", 2)
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    assert "3 ranks x 2 slots, starting from vLLM's placement at its start" in text
    assert "1 chunks are missing, from 000002.npz on." in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "-1"], "--ranks is -1; it must be at least 0"),
        ([*SHAPE, "--delay", "-1"], "--delay is -1; it must be at least 0"),
        ([*SHAPE, "--round-steps", "0"], "--round-steps is 0; it must be at least 1"),
        ([*SHAPE, "--moe-share", "1.5"], "--moe-share is 1.5; it must be from 0 to 1"),
        ([*SHAPE, "--moe-share", "nan"], "--moe-share is nan; it must be from 0 to 1"),
        (["--ranks", "4"], "--ranks and --slots-per-rank go together; give both or none"),
        ([], "a file of counts tells no ranks: give --ranks and --slots-per-rank"),
        (
            ["--ranks", "2", "--slots-per-rank", "2"],
            "16 experts on 2 ranks x 2 slots: every expert needs a slot, and no rank holds one "
            "twice; that takes 8 to 16 slots per rank",
        ),
        (
            [*SHAPE, "--json", "/nowhere/x"],
            "--json /nowhere/x cannot be written: No such file or directory; give the path of a "
            "file that can be",
        ),
    ],
)
def test_wrong_arguments_are_one_sentence(heat, arguments, said):
    assert refused(heat, *arguments) == f"eplb: {said}"


def test_a_policy_that_is_not_there_is_said_as_it_was_given(heat):
    found = refused(heat, *SHAPE, "--policy", "flashbl")
    assert found.startswith("eplb: --policy 'flashbl' names no policy; known are flashlb, ")


def test_a_policy_of_the_environment_is_said_as_that(heat, environment):
    environment.setenv("EPLB_POLICY", "flashbl")
    assert refused(heat, *SHAPE).startswith("eplb: EPLB_POLICY='flashbl' names no policy; known")
    environment.setenv("EPLB_POLICY", "swap")
    environment.setenv("EPLB_EFFORT", "fast")
    said = "eplb: EPLB_EFFORT does nothing with EPLB_POLICY=swap\n"
    assert replay(heat, *SHAPE).stderr.startswith(said)


def test_figures_are_written_though_nobody_reads_the_table(heat, tmp_path):
    command = [sys.executable, "-m", "flash_eplb.eplb.cli", "replay", heat, *SHAPE]
    reader, writer = os.pipe()
    os.close(reader)
    subprocess.run([*command, "--json", "x"], cwd=tmp_path, stdout=writer, check=False)
    os.close(writer)
    assert json.loads((tmp_path / "x").read_text())["policies"]


def test_a_wrong_path_is_one_sentence(tmp_path):
    assert refused(tmp_path / "x").startswith(f"eplb: {tmp_path}/x is not there; give the folder")
    assert refused(tmp_path).startswith(f"eplb: {tmp_path} is no recording: no chunk")


def test_a_recording_that_is_damaged_leaves_no_figures(tmp_path, environment):
    environment.setattr(recorder, "CHUNK_STEPS", 10)
    folder = tmp_path / "recording"
    write(folder, 40)
    path = folder / "000003.npz"
    content = bytearray(path.read_bytes())
    place = content.index(b"heat.npy") + 300
    content[place : place + 40] = bytes(255 - byte for byte in content[place : place + 40])
    path.write_bytes(content)
    said = refused(folder, "--policy", "static", "--json", tmp_path / "x")
    assert re.fullmatch(
        rf"eplb: {path} is damaged \(.*\); remove it to read the other chunks", said
    )
    assert os.listdir(tmp_path) == ["recording"]


def test_a_recording_without_heat_is_said(tmp_path):
    np.save(tmp_path / "heat.npy", np.zeros((4, 2, 16), int))
    assert "has no step with tokens" in refused(tmp_path / "heat.npy", *SHAPE)


@pytest.mark.parametrize(("steps", "episodes"), [(9, 0), (40, 2)])
def test_what_is_too_short_to_be_planned_on_is_said(heat, tmp_path, steps, episodes):
    short, target = tmp_path / "short.npy", tmp_path / "figures.json"
    np.save(short, np.load(heat)[:steps])
    result = replay(short, *SHAPE, "--json", target)
    assert result.exit_code == 0, result.stderr
    assert (
        f"No policy has planned: {steps} steps with tokens are {episodes} episodes of "
        "EPLB_EPISODE_STEPS=16, and the first plan comes after EPLB_MIN_EPISODES=8, which takes "
        "128 steps; record longer, or lower one of them."
    ) in result.stdout
    assert "nan" not in result.stdout
    cells = table(result.stdout)["static"][:4]
    assert (cells[2:] == ["-", "-"]) == (episodes == 0)
    assert "-" not in cells[:2]
    found = json.loads(target.read_text(), parse_constant=pytest.fail)["policies"]["static"]
    assert (found["episode_par_mean"] is None) == (episodes == 0)


def test_figures_that_cannot_be_written_leave_nothing(heat, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flash_eplb.eplb.output.os.replace", full)
    result = replay(heat, *SHAPE, "--policy", "static", "--json", tmp_path / "x")
    assert result.exit_code == 2
    assert result.stderr == (
        f"eplb: --json {tmp_path}/x cannot be written: [Errno 28] No space left on device\n"
    )
    assert os.listdir(tmp_path) == ["heat.npy"]


def test_figures_go_into_a_pipe_which_stays(heat, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    ends = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    result = replay(heat, *SHAPE, "--policy", "static", "--json", pipe)
    content = os.read(ends, 1 << 16)
    os.close(ends)
    assert result.exit_code == 0, result.stderr
    assert json.loads(content)["policies"].keys() == {"static"}
    assert pipe.is_fifo()


def test_the_example_of_its_help_names_what_is_there():
    result = replay("--help")
    assert "eplb replay recording --policy flashlb --policy static" in result.stdout
    for option in ("--ranks", "--slots-per-rank", "--delay", "--round-steps", "--moe-share"):
        assert option in result.stdout
