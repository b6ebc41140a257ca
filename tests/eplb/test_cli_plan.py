import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "planners"))
from recordings import FIRST, HEADER, step
from recordings import record as write

from flash_eplb.eplb.cli import app
from flash_eplb.planners import recorder
from flash_eplb.planners.expert_map import read_map
from flash_eplb.planners.flashlb import FlashLB
from flash_eplb.planners.par import episode_par, par
from flash_eplb.planners.replay import linear_placement

pytestmark = pytest.mark.usefixtures("environment")

SHAPE = ["--ranks", "4", "--slots-per-rank", "5"]


def plan(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def refused(*arguments):
    """The sentence with which a call is refused."""
    result = plan(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def table(text):
    """The cells of each row by its label."""
    rows = [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def figures(path):
    """What was written by --json, its rows by label."""
    found = json.loads(path.read_text())
    return found, {row["label"]: row for row in found["rows"]}


@pytest.fixture
def heat(tmp_path):
    """A file of heat that moves from one topic to another: 40 episodes of 16 steps."""
    random = np.random.default_rng(3)
    topics = random.permuted(np.tile(np.arange(1, 17.0) ** -1.1, (2, 3, 1)), axis=2)
    part = np.linspace(0, 1, 640)[:, None, None]
    path = tmp_path / "heat.npy"
    np.save(path, random.poisson(300 * ((1 - part) * topics[0] + part * topics[1])))
    return path


def episodes(heat):
    return np.load(heat).reshape(-1, 16, 3, 16).sum(axis=1)


def best(episodes, start):
    """What FlashLB gives with its best effort."""
    ranks, slots = start.shape[1:]
    lb = FlashLB(ranks, slots, effort="thorough")
    return lb.plan(episodes, start, every_layer=True).placement


def test_a_map_is_the_best_effort_for_the_whole_recording(heat, tmp_path):
    target = tmp_path / "map.json"
    result = plan(heat, *SHAPE, "-o", target, "--json", tmp_path / "x")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == "planned map: 1 of 1\n"
    start = linear_placement(3, 16, 4, 5)
    wanted = best(episodes(heat), start)
    assert (read_map(target).placement == wanted).all()
    assert sorted(os.listdir(tmp_path)) == ["heat.npy", "map.json", "x"]
    found, rows = figures(tmp_path / "x")
    assert list(rows) == ["start", "map"]
    assert (found["layers"], found["experts"], found["ranks"]) == (3, 16, 4)
    assert (found["episodes"], found["settings"]["effort"]) == (40, "thorough")
    for row, placement in (("start", start), ("map", wanted)):
        measured = par(episodes(heat), placement).mean()
        assert rows[row]["whole"]["episode_par_mean"] == pytest.approx(measured)
        measured = episode_par(np.load(heat), placement).mean()
        assert rows[row]["whole"]["step_par_mean"] == pytest.approx(measured)
    text = " ".join(result.stdout.split())
    assert (
        "3 layers, 16 experts on 4 ranks; start: vLLM's placement at its start, 5 slots per rank. "
        "Policy flashlb, effort thorough, 40 episodes of 16 steps."
    ) in text
    assert f"Written: {target}; EPLB_INITIAL_PLACEMENT={target} loads it." in text
    assert "memory" not in text


def test_what_is_held_out_was_not_planned_on(heat, tmp_path):
    result = plan(heat, *SHAPE, "--json", tmp_path / "x")
    start = linear_placement(3, 16, 4, 5)
    early, late = np.split(episodes(heat), 2)
    wanted = best(early, start)
    _, rows = figures(tmp_path / "x")
    held = rows["map"]["held_out"]
    assert held["episodes"] == 20
    assert held["episode_par_mean"] == pytest.approx(par(late, wanted).mean())
    assert held["episode_par_mean"] > rows["map"]["whole"]["episode_par_mean"] + 0.005
    steps = np.load(heat)[320:]
    assert held["step_par_mean"] == pytest.approx(episode_par(steps, wanted).mean())
    measured = par(late, start).mean()
    assert rows["start"]["held_out"]["episode_par_mean"] == pytest.approx(measured)
    time = 0.4 + 0.6 * held["peak"] / rows["start"]["held_out"]["peak"]
    assert rows["map"]["step_time"] == pytest.approx(time)
    cells = table(result.stdout)["map"]
    whole = rows["map"]["whole"]
    assert cells[1:5] == [
        f"{value:.3f}"
        for value in (
            whole["step_par_mean"],
            held["step_par_mean"],
            whole["episode_par_mean"],
            held["episode_par_mean"],
        )
    ]
    assert cells[5] == f"{time - 1:+.1%}"
    assert table(result.stdout)["start"][5] == "+0.0%"
    text = " ".join(result.stdout.split())
    assert "planned on the first 20 episodes and measured on what came after them" in text
    assert (
        "60% of a step under the placement at the start, on the steps held out, is taken to be MoE"
    ) in text


def test_the_share_of_moe_is_that_of_the_model(heat, tmp_path):
    for share in ("0.2", "1"):
        assert plan(heat, *SHAPE, "--moe-share", share, "--json", tmp_path / share).exit_code == 0
    times = [figures(tmp_path / share)[1]["map"]["step_time"] for share in ("0.2", "1")]
    assert 1 - times[0] == pytest.approx(0.2 * (1 - times[1]))


def test_the_settings_are_obeyed(heat, tmp_path, environment):
    environment.setenv("EPLB_EFFORT", "fast")
    environment.setenv("EPLB_EPISODE_STEPS", "64")
    assert "effort fast, 10 episodes of 64 steps" in " ".join(plan(heat, *SHAPE).stdout.split())
    environment.setenv("EPLB_POLICY", "static")
    result = plan(heat, *SHAPE, "-o", tmp_path / "map.json")
    assert "Policy static, 10 episodes of 64 steps." in " ".join(result.stdout.split())
    assert "EPLB_EFFORT does nothing with EPLB_POLICY=static" in result.stderr
    assert (read_map(tmp_path / "map.json").placement == linear_placement(3, 16, 4, 5)).all()


def test_limits_of_a_plan_and_weighted_routing_do_nothing(heat, tmp_path, environment):
    assert plan(heat, *SHAPE, "-o", tmp_path / "free.json").exit_code == 0
    environment.setenv("EPLB_MAX_MOVES", "1")
    environment.setenv("EPLB_MAX_LAYERS", "1")
    environment.setenv("EPLB_ROUTING", "weighted")
    result = plan(heat, *SHAPE, "-o", tmp_path / "map.json")
    assert result.stderr == (
        "eplb: EPLB_MAX_MOVES does nothing here\n"
        "eplb: EPLB_MAX_LAYERS does nothing here\n"
        "eplb: EPLB_ROUTING does nothing here\n"
        "planned map: 1 of 1\n"
    )
    assert (tmp_path / "map.json").read_text() == (tmp_path / "free.json").read_text()


def test_redundant_experts_are_compared(heat, tmp_path):
    result = plan(
        heat, "--ranks", 4, "--redundant", "0..2", "--expert-mb", 1.5, "--json", tmp_path / "x"
    )
    assert result.exit_code == 0, result.stderr
    assert result.stderr == "planned +0: 1 of 3\nplanned +1: 2 of 3\nplanned +2: 3 of 3\n"
    cells = table(result.stdout)
    assert list(cells) == ["start", "+0", "+1", "+2"]
    assert [row[0] for row in cells.values()] == ["4", "4", "5", "6"]
    assert [row[6] for row in cells.values()] == [
        "0 x 3 = 0.0 MiB",
        "0 x 3 = 0.0 MiB",
        "1 x 3 = 4.5 MiB",
        "2 x 3 = 9.0 MiB",
    ]
    found, rows = figures(tmp_path / "x")
    assert found["layer_bytes"] == 4.5 * 2**20
    for number in range(3):
        wanted = best(episodes(heat), linear_placement(3, 16, 4, 4 + number))
        row = rows[f"+{number}"]
        assert (row["slots_per_rank"], row["redundant_per_rank"]) == (4 + number, number)
        measured = par(episodes(heat), wanted).mean()
        assert row["whole"]["episode_par_mean"] == pytest.approx(measured)
    text = " ".join(result.stdout.split())
    assert "+n: 4 slots per rank, the fewest that hold 16 experts, and n more." in text
    assert text.endswith("Memory: slots beyond the fewest x layers.")


@pytest.mark.parametrize("columns", [40, 80])
def test_no_figure_is_cut_where_the_terminal_is_narrow(heat, environment, columns):
    asked = heat, "--ranks", 4, "--redundant", "0,2", "--expert-mb", 234567
    wide = table(plan(*asked).stdout)
    environment.setenv("COLUMNS", str(columns))
    environment.setenv("FORCE_COLOR", "1")  # rich takes what it writes to for a terminal
    found = re.sub("\x1b[^m]*m", "", plan(*asked).stdout)
    assert {label: table(found)[label][:6] for label in wide} == {
        label: cells[:6] for label, cells in wide.items()
    }
    assert "1,407,402.0" in wide["+2"][6]
    assert "1,407,402.0" in found


def test_a_map_is_written_though_nobody_reads_the_table(heat, tmp_path):
    command = [sys.executable, "-m", "flash_eplb.eplb.cli", "plan", heat, *SHAPE]
    reader, writer = os.pipe()
    os.close(reader)
    subprocess.run([*command, "-o", "map", "--json", "x"], cwd=tmp_path, stdout=writer, check=False)
    os.close(writer)
    assert read_map(tmp_path / "map").shape == (3, 16, 4, 5)
    assert json.loads((tmp_path / "x").read_text())["rows"]


def test_ranks_that_do_not_divide_the_experts_are_said(heat):
    result = plan(heat, "--ranks", 3, "--redundant", "2,0")
    cells = table(result.stdout)
    assert list(cells) == ["start", "+0", "+2"]
    assert [row[0] for row in cells.values()] == ["6", "6", "8"]
    assert cells["+2"][6] == "2 x 3"
    text = " ".join(result.stdout.split())
    assert "hold 16 experts, 2 of them redundant over all ranks already, and n more." in text
    assert text.endswith("x layers; --expert-mb gives it in MiB.")


@pytest.fixture
def recording(tmp_path, environment):
    """40 steps of two models on 2 ranks x 4 slots, an expert of their two layers 3 MiB."""
    environment.setattr(recorder, "CHUNK_STEPS", 10)
    environment.setenv("EPLB_EPISODE_STEPS", "4")
    folder = tmp_path / "recording"
    write(folder, 40, header={**HEADER, "models": ["drafter", "main"], "row_bytes": [2**20, 2**21]})
    return folder


def test_a_recording_tells_where_it_starts_and_what_an_expert_weighs(recording, tmp_path):
    result = plan(recording, "--redundant", "0..1", "--json", tmp_path / "x")
    assert result.exit_code == 0, result.stderr
    cells = table(result.stdout)
    assert [row[0] for row in cells.values()] == ["4", "3", "4"]
    assert [row[6] for row in cells.values()] == [
        "1 x 2 = 3.0 MiB",
        "0 x 2 = 0.0 MiB",
        "1 x 2 = 3.0 MiB",
    ]
    text = " ".join(result.stdout.split())
    assert "2 layers of drafter and main, in this order, 6 experts on 2 ranks" in text
    assert "start: the first recorded placement, 4 slots" in text
    (recording / "000002.npz").unlink()
    result = plan(recording, "--ranks", 3, "--slots-per-rank", 2, "-o", tmp_path / "map.json")
    assert read_map(tmp_path / "map.json").shape == (2, 6, 3, 2)
    assert "1 chunks are missing, from 000002.npz on." in result.stdout
    result = plan(recording, "--slots-per-rank", 5, "-o", tmp_path / "map.json")
    assert read_map(tmp_path / "map.json").shape == (2, 6, 2, 5)
    result = plan(recording, "--ranks", 3, "--redundant", "1")
    assert [row[0] for row in table(result.stdout).values()] == ["2", "3"]


def test_experts_that_stay_on_their_recorded_rank_keep_their_slot(recording, tmp_path):
    assert plan(recording, "-o", tmp_path / "map.json").exit_code == 0
    placement = read_map(tmp_path / "map.json").placement
    for layer, rank in np.ndindex(placement.shape[:2]):
        same = np.intersect1d(placement[layer, rank], FIRST[layer, rank])
        assert (placement[layer, rank] == FIRST[layer, rank]).sum() == len(same)


def test_one_episode_has_nothing_to_hold_out(heat, environment):
    environment.setenv("EPLB_EPISODE_STEPS", "500")
    result = plan(heat, *SHAPE)
    cells = table(result.stdout)["map"]
    assert cells[2] == cells[4] == "-"
    assert cells[5].startswith("-")
    text = " ".join(result.stdout.split())
    assert "60% of a step under the placement at the start is taken to be MoE" in text
    assert "Nothing is held out, for there is one episode" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "-1"], "--ranks is -1; it must be at least 0"),
        (["--slots-per-rank", "-1"], "--slots-per-rank is -1; it must be at least 0"),
        ([*SHAPE, "--moe-share", "nan"], "--moe-share is nan; it must be from 0 to 1"),
        ([*SHAPE, "--expert-mb", "-1"], "--expert-mb is -1.0; it must be from 0 to 1000000"),
        ([*SHAPE, "--expert-mb", "nan"], "--expert-mb is nan; it must be from 0 to 1000000"),
        ([], "a file of counts tells no ranks: give --ranks and --slots-per-rank"),
        (["--ranks", "4"], "a file of counts tells no slots: give --slots-per-rank"),
        (["--slots-per-rank", "4"], "a file of counts tells no ranks: give --ranks"),
        (["--redundant", "1"], "a file of counts tells no ranks: give --ranks"),
        (
            [*SHAPE, "--redundant", "1"],
            "--redundant and --slots-per-rank do not go together: the former chooses the slots",
        ),
        (
            ["--ranks", "4", "--redundant", "1", "-o", "map.json"],
            "--redundant and -o do not go together: choose a number first, then write the map with "
            "--slots-per-rank",
        ),
        *(
            (
                ["--ranks", "4", "--redundant", text],
                f"--redundant is {text}; it must be numbers of redundant experts per rank from 0 "
                "to 4096, such as 0..8 or 0,2,4",
            )
            for text in ("x", "8..0", "1,,2", "..8", "1..", "5000", "-1", "0..99999", "1.5", ",")
        ),
        (
            ["--ranks", "4", "--redundant", "0..13"],
            "--redundant is up to 13; it must be at most 12: a rank of 4 has 4 of 16 experts "
            "without redundant ones, and holds none twice",
        ),
        (
            ["--ranks", "2", "--slots-per-rank", "2"],
            "16 experts on 2 ranks x 2 slots: every expert needs a slot, and no rank holds one "
            "twice; that takes 8 to 16 slots per rank",
        ),
        (
            [*SHAPE, "-o", "/nowhere/x"],
            "-o /nowhere/x cannot be written: No such file or directory; give the path of a "
            "file that can be",
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


def test_a_wrong_path_is_one_sentence(tmp_path):
    assert refused(tmp_path / "x").startswith(f"eplb: {tmp_path}/x is not there; give the folder")
    assert refused(tmp_path).startswith(f"eplb: {tmp_path} is no recording: no chunk")


def test_too_little_heat_is_one_sentence_and_leaves_nothing(heat, tmp_path, environment):
    environment.setenv("EPLB_EPISODE_STEPS", "641")
    assert refused(heat, *SHAPE, "-o", tmp_path / "map.json") == (
        "eplb: there are no 641 steps with tokens, which make an episode; record more, or lower "
        "EPLB_EPISODE_STEPS"
    )
    assert os.listdir(tmp_path) == ["heat.npy"]


def test_a_cap_is_none_of_a_map_also_where_the_policy_refuses_it(heat, environment):
    environment.setenv("EPLB_POLICY", "swap")
    environment.setenv("EPLB_MAX_MOVES", "1")
    found = plan(heat, *SHAPE)
    assert found.exit_code == 0
    assert "EPLB_MAX_MOVES does nothing here" in found.stderr


def test_steps_of_which_no_placement_is_known_are_not_called_too_few(tmp_path):
    folder = tmp_path / "recording"
    written = recorder.Recorder(folder, HEADER, 1 << 30)
    for number in range(40):
        written.step(step(number))
    written.close()
    assert refused(folder) == (
        "eplb: there are no 16 steps with tokens, which make an episode; record more, or lower "
        "EPLB_EPISODE_STEPS; 40 steps are left out: their placement was not recorded."
    )


def test_a_policy_that_fails_is_named(heat, environment):
    def failing(*_):
        raise ZeroDivisionError("bug")

    environment.setattr("flash_eplb.planners.baselines.Static.plan", failing)
    environment.setenv("EPLB_POLICY", "static")
    found = refused(heat, *SHAPE)
    assert found == "eplb: EPLB_POLICY='static' failed: ZeroDivisionError: bug"
    environment.setenv("EPLB_POLICY", "flashbl")
    assert refused(heat, *SHAPE).startswith("eplb: EPLB_POLICY='flashbl' names no policy; known")


def test_a_map_that_cannot_be_written_leaves_nothing(heat, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flash_eplb.eplb.output.os.replace", full)
    result = plan(heat, *SHAPE, "-o", tmp_path / "map.json")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        f"eplb: -o {tmp_path}/map.json cannot be written: [Errno 28] No space left on device"
    )
    assert os.listdir(tmp_path) == ["heat.npy"]


def test_a_map_that_cannot_be_read_ends_the_planner_before_it_attaches(session, tmp_path):
    (tmp_path / "map.json").write_text("{}")
    for name, said in (
        ("map.json", " is no expert map: Object missing required field `moe_layer_count`; write "),
        ("x.json", " cannot be read: No such file or directory; write one with `eplb plan HEAT "),
    ):
        found = subprocess.run(
            [sys.executable, "-m", "flash_eplb.eplb.cli", "planner", "--session", session],
            env=os.environ | {"EPLB_INITIAL_PLACEMENT": str(tmp_path / name)},
            capture_output=True,
            text=True,
            timeout=50,
        )
        assert found.returncode == 2
        assert found.stdout == ""
        (line,) = found.stderr.splitlines()
        assert line.startswith("eplb: ")
        assert f"{tmp_path / name}{said}" in line


def test_its_help_has_examples():
    result = plan("--help")
    assert "eplb plan recording -o map.json" in result.stdout
    assert "eplb plan recording --redundant 0..8" in result.stdout
    for option in ("--output", "--redundant", "--moe-share", "--expert-mb", "--json"):
        assert option in result.stdout
