import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from recordings import EXPERTS, FIRST, HEADER, LAYERS, RANKS, SECOND, SLOTS, logical, physical, step
from recordings import record as write

from flash_eplb.planners import chunk, recorder
from flash_eplb.planners.heat_file import HeatFile, open_heat
from flash_eplb.planners.recording import Counts, Recording, RecordingError, sum_episodes


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Forty steps in four chunks, the later half under another placement."""
    monkeypatch.setattr(recorder, "CHUNK_STEPS", 10)
    write(tmp_path, 40)
    return tmp_path


def refusal(path, read=lambda recording: list(recording.steps())):
    """The sentence with which a recording is refused."""
    with pytest.raises(RecordingError) as error:
        read(open_heat(path))
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_steps_come_as_they_were_recorded(folder):
    recording = Recording(folder)
    assert len(recording) == 40
    assert (recording.lost, recording.dropped) == (3, 0)
    shape = recording.layers, recording.experts, recording.ranks, recording.slots
    assert shape == (LAYERS, EXPERTS, RANKS, SLOTS)
    for number, read in enumerate(recording.steps(), 1):
        assert (read.step, read.time_ns, read.tokens, read.flags, read.span) == (
            *(number, 1000 * number, 7 * number, 4, 1),
        )
        assert read.epoch == (number > 20)
        assert (read.heat == physical(number)).all()
        assert (read.placement == (FIRST if number <= 20 else SECOND)).all()
    assert (recording.first_placement() == FIRST).all()
    assert list(recording.placements()) == [(recording.header["run"], epoch) for epoch in (0, 1)]


def test_heat_is_counted_by_expert_under_the_placement_of_each_step(folder):
    recording = Recording(folder)
    expected = [logical(physical(n), FIRST if n <= 20 else SECOND) for n in range(1, 41)]
    assert (np.array([counts.heat for counts in recording.counts()]) == expected).all()
    episodes = list(recording.episodes(16))
    assert len(episodes) == 2
    assert (episodes[1] == np.sum(expected[16:32], axis=0)).all()
    assert recording.unplaced == 0


def test_an_episode_is_full_of_steps_whatever_records_hold_them():
    one = np.ones((1, 2), np.int64)
    counts = [Counts(one, 3), Counts(2 * one, 1), Counts(4 * one, 5), Counts(8 * one, 2)]
    assert [e.tolist() for e in sum_episodes(iter(counts), 4)] == [[[3, 3]], [[4, 4]]]
    assert one.tolist() == [[1, 1]]
    with pytest.raises(ValueError, match="steps is 0; an episode has at least 1"):
        sum_episodes(iter(counts), 0)


def test_tables_are_joined_over_chunks(folder):
    write(folder, 4)
    recording = Recording(folder)
    plans = recording.table("plans")
    assert len(plans) == len(recording.table("outcomes")) == 2
    assert len(set(plans["run"].tolist())) == 2
    assert len(recording.table("plan_moves")) == plans["moves"].sum()
    assert recording.table("transfers")["rows"].sum() == plans["moves"].sum()
    with pytest.raises(KeyError):
        recording.table("plan")


def test_a_chunk_of_before_a_table_was_added_is_read_as_one_where_it_is_empty(folder):
    for path in folder.iterdir():
        with np.load(path) as file:
            arrays = {name: array for name, array in file.items() if name != "transfers"}
        np.savez(path, **arrays)
    recording = Recording(folder)
    assert len(list(recording.steps())) == 40
    assert recording.table("transfers").shape == (0,)
    assert recording.table("transfers").dtype.names[:3] == ("run", "rank", "generation")
    rewrite(folder / "000001.npz", plans=None)
    assert "is damaged (" in refusal(folder, lambda recording: recording.table("plans"))


def test_the_last_chunk_may_be_missing_and_a_temporary_file_there(folder):
    (folder / "000004.npz").unlink()
    (folder / "000004.npz.tmp").write_bytes(b"PK half a chunk")
    recording = Recording(folder)
    assert [step.step for step in recording.steps()] == list(range(1, 31))
    assert recording.missing == []


def test_a_chunk_that_is_gone_is_named_and_the_others_are_read(folder):
    (folder / "000002.npz").unlink()
    recording = Recording(folder)
    assert recording.missing == [2]
    assert len(list(recording.steps())) == 30


def test_steps_whose_placement_was_never_seen_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder.Recorder, "placement", lambda *_: None)
    write(tmp_path, 6)
    recording = Recording(tmp_path)
    assert list(recording.counts()) == []
    assert recording.unplaced == 6
    assert recording.first_placement() is None


def test_the_first_placement_is_that_of_the_first_step_that_has_one(tmp_path):
    early = recorder.Recorder(tmp_path, HEADER, 1 << 30)
    early.step(step(1, 0))  # committed over before anybody looked
    early.placement(1, SECOND)
    early.step(step(2, 1))
    early.close()
    recording = Recording(tmp_path)
    assert len(list(recording.counts())) == 1
    assert (recording.first_placement() == SECOND).all()


def test_an_epoch_of_another_run_is_another_placement(folder):
    swapped = dict(HEADER, session="other")
    one = recorder.Recorder(folder, swapped, 1 << 30)
    one.placement(1, FIRST)
    one.step(step(1, 1))
    one.step(step(2, 0))  # never seen in this run
    one.close()
    last = list(Recording(folder).steps())[-2:]
    assert (last[0].placement == FIRST).all()
    assert last[1].placement is None


@pytest.mark.parametrize("at", [0.02, 0.3, 0.5, 0.7, 0.9, 0.999])
@pytest.mark.parametrize("damage", ["cut", "missing", "flipped"])
def test_a_damaged_chunk_is_named_with_what_to_do(folder, at, damage):
    path = folder / "000002.npz"
    content = path.read_bytes()
    place = int(len(content) * at)
    before, bad, after = content[:place], content[place : place + 40], content[place + 40 :]
    flipped = bytes(255 - byte for byte in bad)
    path.write_bytes(before + {"cut": b"", "missing": after, "flipped": flipped + after}[damage])
    said = refusal(folder, lambda r: (list(r.steps()), r.table("plan_moves"), r.table("outcomes")))
    assert str(path) in said
    assert "it may be whole" not in said
    path.unlink()
    assert len(list(Recording(folder).steps())) == 30


def rewrite(path, **changed):
    with np.load(path) as file:
        arrays = dict(file)
    header = json.loads(str(arrays["header"]))
    if "header" in changed:
        changed["header"] = np.array(json.dumps(header | changed["header"]))
    kept = {name: array for name, array in {**arrays, **changed}.items() if array is not None}
    np.savez(path, **kept)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"header": {"version": 2}}, "has version 2 of the format; this flash_eplb reads version"),
        ({"header": {"format": "x"}}, "is no chunk of a recording: its header says otherwise"),
        ({"header": {"ranks": "2"}}, "is damaged (its header gives ranks as '2'); remove it"),
        ({"header": {"run": 2**63}}, "is damaged (its header gives run as 9223372036854775808)"),
        ({"header": {"dropped": None}}, "is damaged (its header gives dropped as None); remove"),
        ({"header": {"lost": "many"}}, "is damaged (its header gives lost as 'many'); remove it"),
        ({"header": {"staging_rows": -3}}, "is damaged (its header gives staging_rows as -3)"),
        ({"header": {"models": 3}}, "is damaged (its header gives models as 3); remove it"),
        ({"header": {"row_bytes": "9"}}, "is damaged (its header gives row_bytes as '9')"),
        ({"header": {"row_bytes": [None]}}, "is damaged (its header gives row_bytes as [None])"),
        ({"header": {"settings": [1]}}, "is damaged (its header gives settings as [1])"),
        ({"header": {"settings": {"episode_steps": "x"}}}, "is damaged (its header gives settings"),
        ({"header": {"ranks": 3}}, "is of another engine than the chunks after it; move it"),
        ({"steps": np.arange(3)}, "is damaged (time_ns has shape (10,), not (3,)); remove it"),
        ({"heat": np.zeros((10, 2, 8))}, "is damaged (heat has shape (10, 2, 8), not"),
        ({"spans": np.zeros(10, int)}, "is damaged (it counts below nothing)"),
        ({"placements": np.zeros((1, 2, 2, 4), int)}, "is damaged (layer 0: expert 0 stands twice"),
    ],
)
def test_what_a_chunk_says_is_checked(folder, changed, said):
    path = folder / "000001.npz"
    rewrite(path, **changed)
    assert refusal(folder).startswith(f"{path} {said}")


def test_no_chunk_unpickles_anything(folder):
    path = folder / "000001.npz"
    rewrite(path, steps=np.array([object()], object))
    said = refusal(folder, lambda recording: list(recording.steps()))
    np.savez(path, header=np.array([object()], object))
    assert said == refusal(folder)
    path.write_text("<html>404</html>")
    assert said == refusal(folder)
    assert said.startswith(
        f"{path} is damaged (it holds something else than arrays of numbers); remove it"
    )


def test_a_chunk_that_may_not_be_read_is_not_to_be_removed(folder, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("flash_eplb.planners.chunk.open", refuse, raising=False)
    said = refusal(folder)
    assert said.startswith(f"{folder}/000001.npz may not be read by this user; read it as the one ")
    assert "remove" not in said


def test_a_folder_that_may_not_be_listed_is_said(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert refusal(folder) == (
        f"{folder} may not be read by this user; read it as the one who recorded it, or let others "
        "read it (chmod)"
    )


def test_a_disk_that_fails_is_said_whatever_the_folder_is_called(folder, monkeypatch):
    pickles = folder.rename(folder.parent / "pickles")

    def fail(path, *_):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("flash_eplb.planners.chunk.open", fail, raising=False)
    assert refusal(pickles) == (
        f"{pickles}/000001.npz cannot be read: Input/output error; it may be whole, read it again "
        "once that is mended"
    )


def test_a_folder_that_is_no_recording_is_said(tmp_path):
    assert refusal(tmp_path) == (
        f"{tmp_path} is no recording: no chunk (000001.npz, ...) is in it; set EPLB_RECORD to it "
        "in the planner, and wait up to 30 seconds from the first step for the first one"
    )
    with pytest.raises(RecordingError, match="is no folder; give the one of EPLB_RECORD"):
        Recording(tmp_path / "nothing")


def test_the_document_s_code_runs(folder, monkeypatch):
    text = (Path(chunk.__file__).parents[1] / "docs" / "recording.md").read_text()
    monkeypatch.chdir(folder.parent)
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    exec(code.replace('"recording"', repr(str(folder))), {})


# --- files of others ---------------------------------------------------------------------------

HEAT = np.arange(24).reshape(4, 2, 3)


@pytest.mark.parametrize("form", ["npy", "npz", "named", "pt", "float", "logical_count"])
def test_counts_of_others_are_read(tmp_path, form):
    path = tmp_path / f"heat.{ {'npy': 'npy', 'npz': 'npz', 'named': 'npz'}.get(form, 'pt') }"
    if form == "npy":
        np.save(path, HEAT.astype(np.uint16))
    elif form == "npz":
        np.savez(path, HEAT)
    elif form == "named":
        np.savez(path, decode=HEAT, prefill=HEAT + 1)
        path = f"{path}:decode"
    elif form == "logical_count":
        dump = {"rank": 0, "logical_count": torch.tensor(HEAT, dtype=torch.int32)}
        torch.save(dump | {"average_utilization_rate_over_window": None}, path)
    else:
        torch.save(torch.tensor(HEAT, dtype=torch.float if form == "float" else torch.int), path)
    found = open_heat(path)
    assert (found.layers, found.experts, len(found)) == (2, 3, 4)
    assert [counts.span for counts in found.counts()] == [1] * 4
    assert (np.array([counts.heat for counts in found.counts()]) == HEAT).all()
    assert (np.array(list(found.episodes(2))) == HEAT.reshape(2, 2, 2, 3).sum(axis=1)).all()


def test_sglang_s_records_are_put_together_by_pass(tmp_path):
    where = torch.tensor([[0, 1, 2, 0], [2, 1, 0, 2]])
    records = [
        {"forward_pass_id": n, "rank": 0, "gatherer_key": key, "global_physical_count": count}
        for n, key, count in (
            (8, "primary", torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])),
            (7, "child_a", torch.tensor([[1, 0, 0, 0], [0, 0, 0, 1]])),
            (7, "child_b", torch.tensor([[0, 0, 0, 2], [0, 0, 1, 0]])),
        )
    ]
    path = tmp_path / "dump_0.pt"
    torch.save({"records": records, "last_physical_to_logical_map": where}, path)
    heat = [counts.heat.tolist() for counts in HeatFile(path).counts()]
    assert heat == [[[3, 0, 0], [1, 0, 1]], [[5, 2, 3], [7, 6, 13]]]


def test_half_precision_holds_counts(tmp_path):
    np.save(tmp_path / "heat.npy", HEAT.astype(np.float16))
    found = HeatFile(tmp_path / "heat.npy").counts()
    assert [counts.heat.tolist() for counts in found] == HEAT.tolist()


def test_totals_count_as_one_step(tmp_path):
    np.save(tmp_path / "heat.npy", HEAT[0])
    assert len(HeatFile(tmp_path / "heat.npy")) == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.npy", None, "is not there; give the folder of EPLB_RECORD or a .npy, .npz or .pt"),
        ("a.csv", b"1,2", "is neither the folder of a recording nor a .npy, .npz or .pt file"),
        ("a.npy", b"", "is no .npy file: write it with numpy.save"),
        ("a.npy", b"steps,layers", "is no .npy file: write it with numpy.save"),
        ("a.npy", b"\x93NUMPY", "cannot be read: "),
        ("a.npz", b"PK", "is no .npz file, which is a zip archive; use numpy.savez"),
        ("a.npz", b"steps,layers", "is no .npz file, which is a zip archive; use numpy.savez"),
        ("a.pt", b"PK", "cannot be read: "),
        (
            "a.npy",
            np.array([object()]),
            "cannot be read: it holds something else than arrays of numbers",
        ),
        ("a.npy", HEAT[0, 0], "holds int64 of shape (3,); it must be counts [steps, layers"),
        ("a.npy", HEAT[:0], "holds int64 of shape (0, 2, 3); it must be counts"),
        ("a.npy", HEAT.astype(str), "holds <U21 of shape (4, 2, 3); it must be counts"),
        (
            "a.npy",
            HEAT - 1,
            "holds counts from -1 to 22; they must be finite, at least 0 and below 2**53",
        ),
        ("a.npy", HEAT * np.nan, "holds counts from nan to nan; they must be finite, at least 0"),
        (
            "a.npy",
            HEAT.astype(np.uint64) + 2**63,
            f"holds counts from {2**63} to {2**63 + 23}; they must be finite, at least 0 and below",
        ),
        (
            "a.npy",
            np.full((1, 1, 1), np.inf, np.float16),
            "holds counts from inf to inf; they must be finite, at least 0 and below 2**53",
        ),
        ("a.npy", HEAT / 2, "holds shares, not counts; they must be whole"),
        ("a.npz", {"x": HEAT, "y": HEAT}, "holds 2 arrays; name one as "),
        ("a.pt", {"x": 1}, "holds a dict; it must be a tensor, or a dump of SGLang"),
        ("a.pt", {"records": [{}]}, "is no dump of SGLang that is known here: KeyError: "),
        ("a.pt", {"records": [], "last_physical_to_logical_map": torch.zeros(1, 2)}, "is no dump"),
        ("a.pt", b"x", "cannot be read: it is no file of torch.save, or holds other"),
        (
            "a.pt",
            re.compile("x"),  # nothing but tensors is unpickled
            "cannot be read: it is no file of torch.save, or holds other objects than tensors,",
        ),
    ],
)
def test_a_file_that_holds_no_counts_is_one_sentence(tmp_path, name, content, said):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif name.endswith(".npy") and content is not None:
        np.save(path, content)
    elif name.endswith(".npz"):
        np.savez(path, **content)
    elif content is not None:
        torch.save(content, path)
    assert refusal(path).startswith(f"{path} {said}")


@pytest.mark.parametrize("member", ["", ":heat"])
def test_a_chunk_is_not_taken_for_an_archive_of_counts(folder, member):
    assert refusal(f"{folder}/000001.npz{member}") == (
        f"{folder}/000001.npz is a chunk of a recording; give its folder, {folder}"
    )


def test_an_array_that_an_archive_does_not_have_is_named_with_those_that_it_has(tmp_path):
    np.savez(tmp_path / "a.npz", x=HEAT, y=HEAT)
    assert refusal(f"{tmp_path}/a.npz:z") == f"{tmp_path}/a.npz has no array 'z'; it has x, y"
