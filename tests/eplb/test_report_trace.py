import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import synthetic
from typer.testing import CliRunner

from flash_eplb.eplb.cli import app
from flash_eplb.eplb.report import trace as trace_module

RANKS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs of a made-up recording."""
    made = tmp_path_factory.mktemp("recording")
    synthetic.record(made)
    synthetic.record(made, seed=1)
    return made


@pytest.fixture
def trace(folder, tmp_path):
    """`trace()` writes and reads a trace; what the command said is in `trace.said`."""

    def write():
        path = tmp_path / "trace.json"
        result = CliRunner().invoke(app, ["report", str(folder), "--trace", str(path)])
        assert result.exit_code == 0, result.output
        assert [entry.name for entry in tmp_path.iterdir()] == ["trace.json"]
        write.said = result.stdout
        return json.loads(path.read_text())

    return write


def tracks(content):
    """Events by the names of their process and track, in the order of time."""
    events = content["traceEvents"]
    named = {"process_name": {}, "thread_name": {}}
    for event in events:
        if event["name"] in named:
            named[event["name"]][event["pid"], event.get("tid")] = event["args"]["name"]
    found = {}
    for event in events:
        if event["ph"] != "M":
            process = named["process_name"][event["pid"], None]
            track = named["thread_name"][event["pid"], event["tid"]]
            found.setdefault((process, track), []).append(event)
    return {key: sorted(some, key=lambda event: event["ts"]) for key, some in found.items()}


def test_a_trace_is_what_chrome_s_format_asks_for(trace):
    content = trace()
    assert content["displayTimeUnit"] == "ms"
    assert "runs from the record of the step before it" in content["otherData"]["note"]
    for event in content["traceEvents"]:
        assert event["ph"] in "XiM"
        assert isinstance(event["pid"], int)
        if event["ph"] != "M":
            assert event["ts"] >= 0
            assert isinstance(event["tid"], int)
        if event["ph"] == "X":
            assert event["dur"] > 0
        if event["ph"] == "i":
            assert event["s"] == "t"


def test_each_rank_and_the_planner_have_their_tracks(trace):
    wanted = {("planner", track) for track in ("planning", "plans under way")}
    for rank in range(RANKS):
        for track in ("steps", "rounds", "transfers", "commits"):
            wanted.add((f"EP rank {rank}", track))
    assert tracks(trace()).keys() == wanted


def test_no_two_spans_of_a_track_overlap(trace):
    for name, events in tracks(trace()).items():
        for before, after in pairwise(events):
            assert before["ts"] + before.get("dur", 0) <= after["ts"] + 0.001, (name, before, after)


def test_times_are_microseconds_of_the_recording(trace):
    found = tracks(trace())
    steps = found["EP rank 2", "steps"]
    assert len(steps) == 2 * 633
    first = steps[0]
    assert (first["name"], first["ts"], first["dur"]) == ("step 2", 0, 20_000)
    assert first["args"]["epoch"] == 0
    assert first["args"]["tokens"] > 0
    late = next(event for event in steps if event["name"] == "step 98")
    assert late["args"]["steps not recorded before it"] == 1
    assert late["dur"] == 40_000
    second_run = steps[633]
    assert (second_run["name"], second_run["ts"]) == ("step 2", 639 * 20_000)
    transfer = found["EP rank 0", "transfers"][0]
    commit = found["EP rank 0", "commits"][0]
    at = (72 - 1) * 20_000
    assert transfer["ts"] == pytest.approx(at - 100_000 + 1, abs=0.002)
    assert transfer["ts"] + transfer["dur"] == pytest.approx(at - 20_000)
    assert (commit["name"], commit["dur"]) == ("plan 1 round 1", 500)
    assert commit["ts"] + commit["dur"] == at
    planning = found["planner", "planning"][0]
    assert planning["dur"] == pytest.approx(12_000)
    assert planning["ts"] + planning["dur"] == pytest.approx(63 * 20_000 + 3000)


def test_transfers_lie_over_steps_on_their_rank(trace):
    found = tracks(trace())
    for rank in range(RANKS):
        steps = found[f"EP rank {rank}", "steps"]
        for transfer in found[f"EP rank {rank}", "transfers"]:
            end = transfer["ts"] + transfer["dur"]
            over = [s for s in steps if s["ts"] < end and s["ts"] + s["dur"] > transfer["ts"]]
            assert len(over) >= 3


def test_outcomes_are_told(trace):
    found = tracks(trace())
    names = [event["name"] for event in found["planner", "plans under way"]]
    assert names[:4] == ["plan 1, committed", "plan 2, committed", "plan 3, committed",
                         "plan 4, given up"]  # fmt: skip
    assert names[9] == "plan 10, its end is not recorded"
    assert found["planner", "plans under way"][9]["ph"] == "i"
    rounds = found["EP rank 1", "rounds"]
    assert rounds[3]["name"] == "plan 4 round 4, aborted"
    aborted = [e for e in found["EP rank 1", "commits"] if e["name"].endswith("aborted")]
    assert [event["ph"] for event in aborted] == ["i", "i"]


def test_a_long_recording_leaves_out_its_oldest_steps_and_says_so(trace, monkeypatch):
    monkeypatch.setattr(trace_module, "MOST_STEP_SPANS", 100 * RANKS)
    found = tracks(trace())
    assert len(found["EP rank 0", "steps"]) == 100
    assert found["EP rank 0", "steps"][-1]["name"] == "step 640"
    since = found["EP rank 0", "steps"][0]["ts"]
    assert all(event["ts"] >= since for events in found.values() for event in events)
    assert ": spans of 100 steps; 1166 older steps are left out; open it at" in trace.said
