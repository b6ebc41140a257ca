"""What is measured for a report, its figures at the top, and the command."""

import builtins
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "planners"))
sys.path.insert(0, str(Path(__file__).parent))
import synthetic
from recordings import FIRST, HEADER, RANKS, SECOND, logical, physical, step
from recordings import record as write
from typer.testing import CliRunner

from flash_eplb.eplb.cli import app
from flash_eplb.eplb.report import figures as figures_module
from flash_eplb.eplb.report import measured as measured_module
from flash_eplb.eplb.report.clock import Clock
from flash_eplb.eplb.report.measured import measure
from flash_eplb.eplb.report.page import headlines
from flash_eplb.planners import recorder
from flash_eplb.planners.recorder import Recorder
from flash_eplb.planners.recording import Recording

pytestmark = pytest.mark.usefixtures("environment")


def passed(steps, total):
    """Nobody watches."""
    return steps


def report(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def refused(*arguments):
    """The sentence with which a call is refused."""
    result = report(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture
def folder(tmp_path):
    """Forty steps, the later half under another placement."""
    write(tmp_path / "recording", 40)
    return tmp_path / "recording"


def test_heat_and_loads_are_summed_by_column(folder, monkeypatch):
    monkeypatch.setattr(measured_module, "COLUMNS", 4)
    found = measure(Recording(folder), passed)
    placements = [FIRST if n <= 20 else SECOND for n in range(1, 41)]
    heat = [logical(physical(n), placements[n - 1]) for n in range(1, 41)]
    assert (found.heat == np.reshape(heat, (4, 10, *heat[0].shape)).sum(axis=1)).all()
    loads = [physical(n).reshape(2, RANKS, -1).sum(axis=2) for n in range(1, 41)]
    assert (found.load == np.reshape(loads, (4, 10, 2, RANKS)).sum(axis=1)).all()
    assert found.edges == pytest.approx([0, 10e-6, 20e-6, 30e-6, 39e-6])
    assert (found.steps, found.tokens, found.runs, found.unplaced) == (40, 7 * 820, 1, 0)
    assert found.missing.shape == (0, 2)


def test_par_is_that_of_episodes_of_the_settings_steps(tmp_path):
    write(tmp_path, 40, header=HEADER | {"settings": {"episode_steps": 8}})
    found = measure(Recording(tmp_path), passed)
    assert found.episode_steps == 8
    load = np.sum([physical(n).reshape(2, RANKS, -1).sum(axis=2) for n in range(9, 17)], axis=0)
    assert found.par[1] == pytest.approx(load.max(axis=1) / load.mean(axis=1))
    assert found.par.shape == (5, 2)
    assert found.ends == pytest.approx([7e-6, 15e-6, 23e-6, 31e-6, 39e-6])
    assert found.mean_par(8e-6, 16e-6) == pytest.approx(found.par[1].mean())
    assert np.isnan(found.mean_par(40e-6, 41e-6))


def test_a_layer_without_tokens_has_no_par(tmp_path):
    one = Recorder(tmp_path, HEADER | {"settings": {"episode_steps": 1}}, 1 << 30)
    one.placement(0, FIRST)
    heat = physical(1)
    heat[1] = 0
    one.step(step(1)._replace(heat=heat))
    one.close()
    found = measure(Recording(tmp_path), passed)
    assert np.isnan(found.par).tolist() == [[False, True]]
    assert found.mean_par(0, 1) == pytest.approx(found.par[0, 0])


def test_steps_that_are_not_recorded_are_counted_where_they_are_missing(tmp_path):
    one = Recorder(tmp_path, HEADER, 1 << 30)
    for number, span in ((1, 1), (2, 1), (6, 2), (7, 1)):
        one.step(step(number, span=span))
    one.close()
    write(tmp_path, 2, first=100)  # another run: its numbers begin anew
    found = measure(Recording(tmp_path), passed)
    assert found.missing == pytest.approx(np.array([[5e-6, 2]]))
    assert found.unplaced == 5
    assert found.runs == 2


@pytest.mark.parametrize("most", [1, 100])
def test_long_times_without_steps_are_blank(tmp_path, monkeypatch, most):
    monkeypatch.setattr(measured_module, "MOST_GAPS", most)
    one = Recorder(tmp_path, HEADER, 1 << 30)
    one.placement(0, FIRST)
    for number in (*range(1, 21), *range(221, 241)):  # 200 steps' time after the 20th
        one.step(step(number))
    one.close()
    found = measure(Recording(tmp_path), passed)
    assert found.gaps == pytest.approx(np.array([[19e-6, 220e-6]]))
    edges, cells = found.cells(np.array([0, 10e-6, 230e-6, 239e-6]), np.array([[1], [2], [3]]))
    assert edges == pytest.approx([0, 10e-6, 19e-6, 220e-6, 230e-6, 239e-6])
    assert cells[:, 0] == pytest.approx([1, 2, np.nan, 2, 3], nan_ok=True)
    even = measure(written_evenly(tmp_path / "even"), passed)
    assert even.gaps.shape == (0, 2)


def test_a_time_without_steps_is_blank_before_a_single_last_step_and_after_a_first(tmp_path):
    one = Recorder(tmp_path, HEADER, 1 << 30)
    one.placement(0, FIRST)
    for number in (1, *range(201, 221), 420):  # a chunk ends with the first step after idle time
        one.step(step(number))
    one.close()
    found = measure(Recording(tmp_path), passed)
    edges, cells = found.cells(np.array([0, 210e-6, 419e-6]), np.array([[1], [2]]))
    assert edges == pytest.approx([0, 200e-6, 210e-6, 219e-6, 419e-6])
    assert cells[:, 0] == pytest.approx([np.nan, 1, 2, np.nan], nan_ok=True)


def written_evenly(folder):
    write(folder, 40)
    return Recording(folder)


def test_rounds_are_put_together_from_what_the_ranks_logged(folder):
    found = measure(Recording(folder), passed)
    (round_,) = found.rounds
    moves = int((FIRST != SECOND).sum())
    assert round_["rows"] == moves
    assert round_["received_bytes"] == 64 * moves
    assert round_["committed"]
    assert round_["transfer"] == pytest.approx(500e-9)
    assert round_["commit"] == pytest.approx(100e-9)
    assert found.first_commit == pytest.approx(round_["end"])
    assert round_["end"] == pytest.approx((19_000 + 700 - 1000) / 1e9)


def test_a_round_that_one_rank_did_not_stage_or_commit_did_not_happen(tmp_path, monkeypatch):
    import recordings

    made = recordings.transfers

    def failed(number, plan):
        rows = made(number, plan)
        rows["staged_ns"][1] = rows["committed"][1] = 0
        return rows

    monkeypatch.setattr(recordings, "transfers", failed)
    write(tmp_path, 40)
    (round_,) = measure(Recording(tmp_path), passed).rounds
    assert not round_["committed"]
    assert np.isnan(round_["transfer"])


def test_rounds_of_before_a_run_s_first_step_are_left_out(tmp_path):
    one = Recorder(tmp_path, HEADER, 1 << 30)
    write(tmp_path / "other", 40)
    rows = Recording(tmp_path / "other").table("transfers")
    one.step(step(30))  # the rounds in the log are from before
    ended = np.zeros(2, recorder.RANK_TRANSFER)
    for name in ended.dtype.names:
        ended[name] = rows[name]
    one.transfers(ended)
    one.close()
    assert len(measure(Recording(tmp_path), passed).rounds) == 0


def test_runs_follow_one_another_without_the_time_between():
    clock = Clock()
    assert clock.see(1, 5_000_000_000) == 0
    assert clock.see(1, 7_000_000_000) == 2
    assert clock.see(2, 1_000_000_000) == 2
    assert clock.see(2, 2_000_000_000) == 3
    runs = np.array([1, 2, 2, 1, 3])
    when = clock.seconds(runs, np.array([6, 1.5, 0.5, 4.9, 9]) * 1e9)
    assert when[:2].tolist() == [1, 2.5]
    assert np.isnan(when[2:]).all()


def test_the_figures_at_the_top_are_those_of_the_recording(tmp_path, monkeypatch):
    synthetic.small_chunks(monkeypatch)
    synthetic.record(tmp_path)
    recording = Recording(tmp_path)
    found = measure(recording, passed)
    figures = headlines(recording, found)
    transfers = recording.table("transfers")
    assert figures["steps"] == "634"
    assert figures["steps not recorded"] == "6"
    assert (figures["plans sent"], figures["plans committed"]) == ("10", "8")
    assert (figures["plans given up"], figures["rounds aborted"]) == ("1", "1")
    assert figures["rounds committed"] == "8"
    assert figures["slots moved"] == str(transfers["rows"].sum())
    assert figures["moved between ranks"] == f"{transfers['received_bytes'].sum() / 1024:.1f} KiB"
    before = found.par[found.ends < found.first_commit].mean()
    after = found.par[found.ends >= found.first_commit].mean()
    assert figures["PAR before the first commit"] == f"{before:.3f}"
    assert figures["PAR since then"] == f"{after:.3f}"
    assert before != after
    assert all(name[0] != " " and value for name, value in figures.items())


def test_a_recording_without_round_logs_counts_the_moves_of_its_plans(folder):
    for path in folder.iterdir():
        with np.load(path) as file:
            arrays = {name: array for name, array in file.items() if name != "transfers"}
        np.savez(path, **arrays)
    recording = Recording(folder)
    figures = headlines(recording, measure(recording, passed))
    assert figures["slots moved"] == str(int((FIRST != SECOND).sum()))
    assert figures["plans committed"] == "1"


def test_a_recording_from_outside_says_nothing_of_plans(folder):
    for path in folder.iterdir():
        with np.load(path) as file:
            arrays = dict(file)
        np.savez(path, **arrays | {name: arrays[name][:0] for name in ("plans", "outcomes")})
    recording = Recording(folder)
    figures = headlines(recording, measure(recording, passed))
    assert [figures[f"plans {how}"] for how in ("sent", "committed", "given up")] == ["–"] * 3
    assert figures["rounds committed"] == "1"


def test_scatter_plots_show_a_bounded_number_of_points(tmp_path, monkeypatch):
    monkeypatch.setattr(figures_module, "MOST_POINTS", 3)
    synthetic.record(tmp_path)
    drawn = figures_module.plots(measure(Recording(tmp_path), passed))
    (durations,) = (plot.figure for plot in drawn if plot.name == "durations")
    counts = {trace.name: len(trace.x) for trace in durations.data}
    assert counts["planning"] == 3
    assert max(counts.values()) == 3
    (moves,) = (plot.figure for plot in drawn if plot.name == "moves")
    assert max(len(trace.x) for trace in moves.data if trace.type == "scatter") == 3


def test_a_page_is_written_whole_and_its_size_is_bounded(tmp_path):
    synthetic.record(tmp_path / "short", steps=300)
    synthetic.record(tmp_path / "long", steps=3000)
    for name in ("short", "long"):
        result = report(tmp_path / name, "-o", tmp_path / f"{name}.html")
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        assert result.stdout.startswith(f"{tmp_path / name}.html: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "long",
        "long.html",
        "short",
        "short.html",
    ]
    sizes = [(tmp_path / f"{name}.html").stat().st_size for name in ("short", "long")]
    assert sizes[1] < sizes[0] + 100_000
    assert sizes[1] < 8 << 20


def test_the_page_goes_to_report_html_unless_told(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert report(folder).exit_code == 0
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("option", ["-o", "--trace"])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "it is a folder"),
        ("nowhere/report.html", "No such file or directory"),
        ("n" * 300, "File name too long"),
    ],
)
def test_a_file_that_cannot_be_written_is_said_before_the_work(folder, option, name, why, tmp_path):
    path = tmp_path / name
    said = refused(folder, option, path)
    assert said == (
        f"eplb: {option} {path} cannot be written: {why}; give the path of a file that can be"
    )


def test_a_device_that_may_not_be_written_is_said_before_the_work(folder, monkeypatch):
    monkeypatch.setattr("flash_eplb.eplb.output.os.access", lambda *_: False)
    assert refused(folder, "-o", "/dev/null") == (
        "eplb: -o /dev/null cannot be written: Permission denied; give the path of a file that can "
        "be"
    )


def test_a_disk_that_is_full_leaves_no_half_page(folder, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    said = refused(folder, "-o", tmp_path / "r.html")
    assert said.startswith(f"eplb: -o {tmp_path / 'r.html'} cannot be written: [Errno 28] No space")
    assert [path.name for path in tmp_path.iterdir()] == ["recording"]


def test_a_page_that_is_written_is_said_though_the_time_line_fails(folder, tmp_path, monkeypatch):
    replace = os.replace

    def full(source, target, **rest):
        if str(target).endswith(".json"):
            raise OSError(28, "No space left on device")
        return replace(source, target, **rest)

    monkeypatch.setattr(os, "replace", full)
    done = report(folder, "-o", tmp_path / "r.html", "--trace", tmp_path / "t.json")
    assert done.exit_code == 2
    assert f"{tmp_path / 'r.html'}: " in done.stdout
    assert f"--trace {tmp_path / 't.json'} cannot be written: [Errno 28]" in done.stderr


def test_an_output_that_nobody_reads_is_not_blamed_on_the_files(folder, tmp_path):
    command = [sys.executable, "-m", "flash_eplb.eplb.cli", "report", folder, "--trace", "t.json"]
    reader, writer = os.pipe()
    os.close(reader)
    found = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (found.returncode, found.stderr) == (1, "")
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True
        )
    said = "eplb: the output cannot be written: No space left on device\n"
    assert (found.returncode, found.stderr) == (1, said)


def test_what_is_no_recording_is_one_sentence(tmp_path):
    assert "is no folder" in refused(tmp_path / "nothing")
    assert "is no recording: no chunk" in refused(tmp_path)
    one = Recorder(tmp_path, HEADER, 1 << 30)
    one.placement(0, FIRST)
    one.close()
    said = refused(tmp_path, "-o", tmp_path / "r.html")
    assert said == "eplb: the recording holds no step; there is nothing to report"
    (tmp_path / "000001.npz").write_bytes(b"PK")
    assert "000001.npz is damaged" in refused(tmp_path)


def test_without_plotly_it_says_what_to_install(folder, tmp_path, monkeypatch):
    found = builtins.__import__

    def without(name, *arguments):
        if name.partition(".")[0] == "plotly":
            raise ModuleNotFoundError("No module named 'plotly'")
        return found(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    said = refused(folder, "-o", tmp_path / "r.html")
    assert said == ("eplb: a page is drawn by plotly, which is not here: pip install plotly")
    assert report(folder, "--trace", tmp_path / "t.json").exit_code == 0


def test_the_command_shows_a_bar_on_a_terminal_only(folder, tmp_path):
    script = f"eplb report {folder} -o {tmp_path / 'r.html'}"
    command = ["script", "-qec", script, "/dev/null"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "TERM": "xterm"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "reading" in done.stdout


def test_a_plot_of_nothing_is_left_out(folder):
    drawn = figures_module.plots(measure(Recording(folder), passed))
    assert "missing" not in [plot.name for plot in drawn]
    assert "par" in [plot.name for plot in drawn]


@pytest.mark.parametrize(("most", "low", "middle"), [(1.5, 0.5, 0.5), (5.0, 0.0, 0.2)])
def test_the_colours_of_loads_are_pale_at_the_mean_and_end_at_nothing(folder, most, low, middle):
    found = measure(Recording(folder), passed)
    load = np.ones((len(found.load), 1, 8)) * (8 - most) / 7
    load[:, :, 3] = most
    (plot,) = (p for p in figures_module.plots(replace(found, load=load)) if p.name == "rank-loads")
    (drawn,) = plot.figure.data
    assert (drawn.zmin, drawn.zmax) == (pytest.approx(low), pytest.approx(most))
    assert [place for place, _ in drawn.colorscale] == pytest.approx([0, middle, 1])
