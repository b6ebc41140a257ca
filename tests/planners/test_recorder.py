import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from recordings import FIRST, HEADER, LAYERS, RANKS, SECOND, SLOTS, physical, record, step, stopped

from flash_eplb.planners import chunk, recorder
from flash_eplb.planners.recorder import Recorder
from flash_eplb.planners.recording import Recording


def chunks(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith(".npz"))


@pytest.fixture
def small(monkeypatch):
    """Chunks of ten steps."""
    monkeypatch.setattr(recorder, "CHUNK_STEPS", 10)


def test_a_chunk_is_what_the_document_says_and_numpy_reads_it(tmp_path):
    record(tmp_path, 4)
    assert chunks(tmp_path) == ["000001.npz"]
    assert os.listdir(tmp_path) == ["000001.npz"]
    with np.load(tmp_path / "000001.npz", allow_pickle=False) as file:
        found = dict(file)
    header = json.loads(str(found.pop("header")))
    assert header | HEADER == header
    assert (header["format"], header["version"]) == ("flash_eplb recording", 1)
    assert found["steps"].tolist() == [1, 2, 3, 4]
    assert found["time_ns"].tolist() == [1000, 2000, 3000, 4000]
    assert found["tokens"].tolist() == [7, 14, 21, 28]
    assert found["flags"].tolist() == [4] * 4
    assert found["epochs"].tolist() == [0, 0, 1, 1]
    assert found["spans"].tolist() == [1] * 4
    assert (found["heat"] == [physical(n) for n in range(1, 5)]).all()
    assert found["heat"].dtype == np.uint16
    assert found["placement_epochs"].tolist() == [0, 1]
    assert (found["placements"] == [FIRST, SECOND]).all()
    (plan,) = found["plans"]
    moves = int((FIRST != SECOND).sum())
    assert [plan[name] for name in ("plan", "epoch", "layers", "moves")] == [1, 0, 2, moves]
    assert (plan["seconds"], plan["par_before"], plan["par_after"]) == (0.25, 1.4, 1.15)
    assert sorted(found["plan_layers"]["par_before"].tolist()) == [1.3, 1.5]
    assert len(found["plan_moves"]) == moves
    assert (found["plan_moves"]["plan"] == 1).all()
    (outcome,) = found["outcomes"]
    assert outcome["committed"]
    assert outcome["time_ns"] >= plan["sent_ns"]
    assert found["transfers"]["rank"].tolist() == [0, 1]
    assert found["transfers"]["rows"].sum() == moves
    documented = (chunk.Path(__file__).parents[2] / "docs" / "recording.md").read_text()
    for name in [*found, *header, *found["transfers"].dtype.names]:
        assert f"`{name}`" in documented


@pytest.mark.parametrize(
    ("largest", "dtype"), [(65535, "u2"), (65536, "i4"), (2**31 - 1, "i4"), (2**31, "i8")]
)
def test_counts_are_kept_whole_in_the_narrowest_type(largest, dtype):
    counts = np.array([0, largest])
    assert chunk.narrowest(counts).dtype == dtype
    assert (chunk.narrowest(counts) == counts).all()


@pytest.mark.usefixtures("small")
def test_each_chunk_has_the_placements_of_its_steps(tmp_path):
    record(tmp_path, 40)
    assert chunks(tmp_path) == [f"00000{n}.npz" for n in range(1, 5)]
    for name, epochs in zip(chunks(tmp_path), ([0], [0], [0, 1], [1]), strict=False):
        with np.load(tmp_path / name) as file:
            assert set(file["epochs"]) <= set(file["placement_epochs"])
            assert set(epochs) >= set(file["epochs"])


def test_a_chunk_with_more_commits_than_are_remembered_has_all_its_placements(tmp_path):
    one = Recorder(tmp_path, HEADER, 1 << 30)
    for epoch in range(600):
        one.placement(epoch, FIRST)
        one.step(step(epoch + 1, epoch=epoch))
    one.close()
    assert len(chunks(tmp_path)) == 1
    recording = Recording(tmp_path)
    assert all(found.placement is not None for found in recording.steps())
    assert list(recording.placements()) == [(recording.header["run"], n) for n in range(600)]


@pytest.mark.usefixtures("small")
def test_a_later_run_appends(tmp_path):
    record(tmp_path, 20)
    record(tmp_path, 20)
    assert len(chunks(tmp_path)) == 4
    found = list(Recording(tmp_path).steps())
    assert [one.step for one in found] == [*range(1, 21)] * 2
    assert len({one.run for one in found}) == 2


@pytest.mark.usefixtures("small")
def test_the_oldest_chunks_are_removed_beyond_the_limit(tmp_path):
    record(tmp_path, 10)
    size = (tmp_path / "000001.npz").stat().st_size
    (tmp_path / "notes.txt").write_text("mine")
    limit = size * 7 // 2
    record(tmp_path, 100, most_bytes=limit)
    assert sum((tmp_path / name).stat().st_size for name in chunks(tmp_path)) <= limit
    assert chunks(tmp_path)[-1] == "000011.npz"
    assert 2 <= len(chunks(tmp_path)) <= 4
    found = list(Recording(tmp_path).steps())
    assert found[-1].step == 100
    assert all(one.placement is not None for one in found)
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.usefixtures("small")
def test_the_newest_chunk_stays_whatever_the_limit(tmp_path):
    record(tmp_path, 20, most_bytes=1)
    assert chunks(tmp_path) == ["000002.npz"]


def test_an_old_chunk_is_closed_though_it_is_not_full(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "CHUNK_SECONDS", 0.05)
    one = Recorder(tmp_path, HEADER, 1 << 30)
    one.step(step(1))
    time.sleep(0.1)
    one.step(step(2))
    one.step(step(3))
    one.close()
    assert len(chunks(tmp_path)) == 2


KILLED = """
import itertools, sys
sys.path.insert(0, sys.argv[2])
from recordings import FIRST, HEADER, step
from flash_eplb.planners import recorder
recorder.CHUNK_STEPS = 5
one = recorder.Recorder(sys.argv[1], HEADER, 1 << 30)
one.placement(0, FIRST)
for number in itertools.count(1):
    one.step(step(number))
    while one._waiting.full():
        pass
    if number == 100:
        print("ready", flush=True)
"""


def test_a_kill_costs_the_chunk_that_was_being_filled_and_no_more(tmp_path, start, amount):
    for turn in range(amount(3, 200)):
        folder = tmp_path / str(turn)
        script = start(KILLED, folder, os.path.dirname(__file__))
        script.line()
        time.sleep(turn % 7 * 0.003)
        script.kill()
        found = [one.step for one in Recording(folder).steps()]
        assert len(found) >= 50  # at most those that wait, and the one that is filled, are gone
        assert found == list(range(1, len(found) + 1))
        assert len(found) % 5 == 0
        record(folder, 4, first=10**6)  # what was left does no harm to a successor
        assert not [name for name in os.listdir(folder) if not name.endswith(".npz")]
        assert [one.step for one in Recording(folder).steps()][-1] == 10**6 + 3


def test_a_kill_at_any_point_of_writing_leaves_the_chunks_before_it(tmp_path, monkeypatch):
    record(tmp_path, 4)
    before = (tmp_path / "000001.npz").read_bytes()

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    for name in ("fsync", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(chunk.os, name, kill)
            patch.setattr(chunk.Path, "unlink", lambda *_, **__: None)  # the dead tidy nothing up
            with pytest.raises(Killed):
                chunk.write_chunk(tmp_path / "000002.npz", {"header": np.array("x")})
        assert sorted(os.listdir(tmp_path)) == ["000001.npz", "000002.npz.tmp"]
        assert (tmp_path / "000001.npz").read_bytes() == before
        assert len(list(Recording(tmp_path).steps())) == 4


@pytest.mark.usefixtures("small")
def test_a_full_disk_ends_the_recording_with_one_line_and_leaves_what_was_whole(
    tmp_path, monkeypatch, caplog
):
    sync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 5:  # a file and its folder each time: the third chunk
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(chunk.os, "fsync", full)
    one = Recorder(tmp_path, HEADER, 1 << 30)
    one.placement(0, FIRST)
    for number in range(1, 101):
        one.step(step(number))
        time.sleep(0.002)
    one.ended(1, True)
    one.close()
    assert stopped(caplog) == (
        f"recording to EPLB_RECORD={tmp_path} has stopped, planning goes on: [Errno 28] No space "
        "left on device; put that right and restart the planner to record again"
    )
    assert sorted(os.listdir(tmp_path)) == chunks(tmp_path)
    assert len(list(Recording(tmp_path).steps())) == 20
    assert not one._filling.steps  # it keeps nothing more


ON_A_FULL_DISK = """
import logging, os, sys, time
sys.path.insert(0, sys.argv[2])
import numpy as np
from recordings import FIRST, HEADER
from flash_eplb.planners import recorder
from flash_eplb.planners.recording import Recording
from flash_eplb.planners.step_heat import StepHeat
logging.basicConfig()
recorder.CHUNK_STEPS = 100
one = recorder.Recorder(sys.argv[1], HEADER, 1 << 30)
one.placement(0, FIRST)
random = np.random.default_rng(0)
for number in range(3000):
    one.step(StepHeat(number, 0, random.integers(0, 2**40, (2, 8))))
    while one._waiting.full() and one._thread.is_alive():
        time.sleep(0.001)
one.close()
print(len(list(Recording(sys.argv[1]).steps())), sorted(os.listdir(sys.argv[1]))[-1])
"""


def test_on_a_disk_that_is_really_full_it_is_the_same(tmp_path):
    mount = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=64k none {tmp_path} && "$@"']
    if (
        not shutil.which("unshare")
        or subprocess.run([*mount, "sh", "true"], check=False).returncode
    ):
        pytest.skip("no tmpfs can be mounted here")
    script = [sys.executable, "-c", ON_A_FULL_DISK, tmp_path, os.path.dirname(__file__)]
    found = subprocess.run(
        [*mount, "sh", *script], capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stderr.count("No space left on device") == 1
    assert len(found.stderr.splitlines()) == 1
    steps, last = found.stdout.split()
    assert 0 < int(steps) < 3000
    assert int(steps) % 100 == 0
    assert last == f"{int(steps) // 100:06}.npz"


@pytest.mark.parametrize("kind", ["file", "shape", "foreign", "other version"])
def test_a_folder_that_cannot_be_used_is_said_and_left_alone(tmp_path, caplog, kind):
    folder = tmp_path / "recording"
    if kind == "file":
        folder.write_text("mine")
        said = "File exists"
    elif kind == "shape":
        record(folder, 4, header=HEADER | {"experts": 5})
        said = (
            "it holds a recording of 2 layers, 5 experts, 2 ranks x 4 slots, and this engine has 2 "
            "layers, 6 experts, 2 ranks x 4 slots; give it another folder"
        )
    else:
        folder.mkdir()
        header = {"format": chunk.FORMAT, "version": 2} if kind == "other version" else {}
        np.savez(folder / "000001.npz", header=np.array(json.dumps(header)))
        said = "has version 2 of the format" if header else "is no chunk of a recording"
    before = folder.read_text() if kind == "file" else os.listdir(folder)
    record(folder, 4)
    assert said in stopped(caplog)
    assert (folder.read_text() if kind == "file" else os.listdir(folder)) == before


def test_two_planners_do_not_record_in_one_folder(tmp_path, caplog):
    first = Recorder(tmp_path, HEADER, 1 << 30)
    first.step(step(1))
    time.sleep(0.3)  # its thread has the folder by then
    record(tmp_path, 4)
    assert "another process records there; give each a folder" in stopped(caplog)
    first.close()
    assert len(list(Recording(tmp_path).steps())) == 1


@pytest.mark.usefixtures("small")
def test_a_disk_that_is_too_slow_loses_chunks_and_holds_nothing_up(tmp_path, monkeypatch, caplog):
    write = recorder.write_chunk

    def slow(path, arrays):
        time.sleep(0.1)
        write(path, arrays)

    monkeypatch.setattr(recorder, "write_chunk", slow)
    one = Recorder(tmp_path, HEADER, 1 << 30)
    one.placement(0, FIRST)
    begun = time.monotonic()
    for number in range(1, 501):
        one.step(step(number))
    assert time.monotonic() - begun < 0.1
    time.sleep(0.3)
    for number in range(501, 511):
        one.step(step(number))
    one.close()
    assert sum("too slow" in record.getMessage() for record in caplog.records) == 1
    recording = Recording(tmp_path)
    kept = len(list(recording.steps()))
    assert kept + recording.dropped == 510
    assert recording.dropped > 300


def test_a_chunk_is_bounded_in_memory(tmp_path):
    wide = {"layers": LAYERS * 1000, "experts": 6, "ranks": RANKS * 100, "slots": SLOTS}
    one = Recorder(tmp_path, wide, 1 << 30)
    assert one._steps == recorder.CHUNK_BYTES // (8 * 2000 * 200 * 4)
    one.close()
    assert not chunks(tmp_path)
