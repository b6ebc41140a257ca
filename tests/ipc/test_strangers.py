"""Whatever else bears a segment's name: refused by one sentence, and never written to."""

import os
import socket
import stat
import struct
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fuzz_targets import PLACEMENT, SHAPE, header_of, segment_of
from typer.testing import CliRunner

from flash_eplb.eplb.cli import app
from flash_eplb.ipc import plan_queue
from flash_eplb.ipc import segment as segment_module
from flash_eplb.ipc.liveness import SegmentError, owner_is_alive
from flash_eplb.ipc.names import rank_name
from flash_eplb.ipc.plan_queue import SLOTS, PlanQueue
from flash_eplb.ipc.rank_segment import RankSegment, check_group, segment_bytes
from flash_eplb.ipc.round import RoundError, decode_round
from flash_eplb.ipc.segment import LAYOUT, Segment, take_name
from flash_eplb.ipc.session import remove_dead
from flash_eplb.ipc.status import Field, StepTimings
from flash_eplb.planners.group import Group


@pytest.fixture
def path(session):
    """Where the segment of EP rank 0 lies; whatever is there goes at the end."""
    place = f"/dev/shm{rank_name(session, 0)}"
    yield place
    if os.path.isdir(place):
        os.rmdir(place)
    elif os.path.lexists(place):
        os.unlink(place)


def put(path, content, mode=0o600):
    with open(path, "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)


def state(path):
    """All that a write would change."""
    status = os.lstat(path)
    content = b""
    if stat.S_ISREG(status.st_mode) and status.st_size < 10**7:
        with open(path, "rb") as file:
            content = file.read()
    return status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, content


def refusal(path):
    """The one sentence with which a reader, a planner and an observer refuse the segment."""
    name = path.removeprefix("/dev/shm")
    session = name.split(".")[1]
    before = state(path)
    said = set()
    for attach in (
        lambda: RankSegment.open(name),
        lambda: RankSegment.open(name, writable=True),
        lambda: Group.attach(session),
    ):
        with pytest.raises(SegmentError) as error:
            attach()
        said.add(str(error.value))
    assert state(path) == before
    (text,) = said
    assert name in text
    assert text.isprintable()
    assert len(text) < 500
    return text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shape": msgspec.to_builtins(SHAPE) | {"ring_slots": 10**18}}, "at `$.shape.ring_slots`"),
        ({"rank": 1}, "was made as '/eplb.{}.rank.1' and has got this name since; remove it"),
        ({"session": "b"}, "was made as '/eplb.b.rank.0' and has got this name since; remove it"),
    ],
)
def test_a_header_that_is_not_this_segments_is_refused(path, session, changes, reason):
    put(path, segment_of(header_of(session, **changes)))
    assert reason.format(session) in refusal(path)


def test_a_segment_is_refused_unless_it_is_as_long_as_its_shape_says(path, session):
    whole = segment_of(header_of(session))
    put(path, whole)
    RankSegment.open(rank_name(session, 0)).close()
    body = segment_bytes(SHAPE)
    for size in (len(whole) - 1, len(whole) - body, len(whole) + 1, len(whole) + 64):
        os.truncate(path, size)
        shown = size - len(whole) + body
        assert f"has {shown} bytes after its header, its shape takes {body}" in refusal(path)


def test_a_segment_that_is_cut_anywhere_in_its_header_is_refused(path, session):
    whole = segment_of(header_of(session))
    for size in range(len(whole) - segment_bytes(SHAPE)):
        put(path, whole[:size])
        text = refusal(path)
        assert any(
            part in text for part in ("is not ready: ", "has a damaged header", "bytes after its")
        )


@pytest.mark.parametrize("size", [2**40, 2**62])
def test_a_file_without_end_is_refused(path, session, size):
    put(path, segment_of(header_of(session)))
    try:
        os.truncate(path, size)
    except OSError:
        pytest.skip("the file system has no such files")
    text = refusal(path)
    assert "bytes after its header" in text or "cannot be mapped" in text


def test_a_header_without_end_is_refused_before_it_is_read(path, session):
    content = bytearray(segment_of(header_of(session)))
    content[12:16] = b"\xff" * 4
    put(path, content)
    os.truncate(path, 2**40)
    assert "has a damaged header" in refusal(path)


@pytest.mark.parametrize("kind", ["fifo", "directory", "socket", "device", "link", "loose link"])
def test_what_is_no_file_is_refused_and_left_there(path, session, kind):
    name = rank_name(session, 0)
    target = f"{path}.target"
    with socket.socket(socket.AF_UNIX) as sock:
        if kind == "fifo":
            os.mkfifo(path, 0o600)
        elif kind == "directory":
            os.mkdir(path, 0o700)
        elif kind == "socket":
            sock.bind(path)
        elif kind == "device":
            try:
                os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))
            except PermissionError:
                pytest.skip("only root makes devices")
        else:
            os.symlink(target, path)
    if kind == "link":
        put(target, segment_of(header_of(session)))
    text = refusal(path)
    if kind == "link":
        os.unlink(target)
    assert text == (
        f"shared memory {name} cannot be opened: it is not a regular file; "
        "remove it or choose another EPLB_SESSION"
    )
    for action in (
        lambda: owner_is_alive(name),
        lambda: take_name(session, name, b"", 10, 1),
    ):
        with pytest.raises(SegmentError, match="it is not a regular file"):
            action()
    assert remove_dead(session) == []
    status = CliRunner().invoke(app, ["status", "--session", session])
    assert (status.exit_code, status.stdout) == (1, "")
    assert status.stderr == f"eplb: no engine in session {session!r}: {text}\n"
    clean = CliRunner().invoke(app, ["clean", "--session", session])
    assert (clean.exit_code, clean.output) == (0, "nothing to remove\n")
    assert os.path.lexists(path)


@pytest.mark.parametrize("mode", [0o444, 0o400, 0o666, 0o640, 0o700])
def test_a_file_of_another_mode_is_refused(path, session, mode):
    put(path, segment_of(header_of(session)), mode)
    assert f"its mode is {mode:04o}, ours is 0600; remove it" in refusal(path)


def test_a_file_that_the_kernel_does_not_open_tells_its_mode(path, session, monkeypatch):
    put(path, segment_of(header_of(session)), 0o400)

    def forbid(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", forbid)
    with pytest.raises(SegmentError) as error:
        owner_is_alive(rank_name(session, 0))
    assert str(error.value) == (
        f"shared memory {rank_name(session, 0)} cannot be opened: Permission denied; "
        "its mode is 0400, ours is 0600; remove it"
    )


def test_a_segment_renamed_or_linked_from_another_session_is_refused(path, session):
    other = RankSegment.create(session + "b", SHAPE, 0, 1)
    other.publish()
    there = f"/dev/shm{rank_name(session + 'b', 0)}"
    os.link(there, path)
    assert f"was made as '/eplb.{session}b.rank.0'" in refusal(path)
    RankSegment.open(rank_name(session + "b", 0)).close()
    os.unlink(path)
    os.rename(there, path)
    assert f"was made as '/eplb.{session}b.rank.0'" in refusal(path)
    os.rename(path, there)
    other.close()


@pytest.mark.parametrize("there", [LAYOUT - 1, LAYOUT + 1])
def test_a_reader_of_one_layout_refuses_the_next_and_the_last(session, monkeypatch, there):
    monkeypatch.setattr(segment_module, "LAYOUT", there)
    rank = RankSegment.create(session, SHAPE, 0, 1)
    rank.publish()
    monkeypatch.setattr(segment_module, "LAYOUT", LAYOUT)
    assert refusal(f"/dev/shm{rank_name(session, 0)}") == (
        f"shared memory {rank_name(session, 0)} has layout {there}, this version reads {LAYOUT}; "
        "run the same flash_eplb in the workers and the planner"
    )
    rank.close()


def test_random_bytes_after_the_magic_are_refused(path):
    chance = np.random.default_rng(1)
    for _ in range(50):
        content = bytearray(chance.bytes(chance.integers(36, 3000)))
        content[:12] = struct.pack("<QI", segment_module._MAGIC, LAYOUT)
        put(path, content)
        assert "has a damaged header" in refusal(path)


def test_an_unpublished_strangers_pid_is_not_asked_for(path, session):
    put(path, b"NOT OURS" + segment_of(header_of(session))[8:])
    with pytest.raises(SegmentError, match="has another magic"):
        Segment.open(rank_name(session, 0), published=False)


def group(session, *changes):
    """Segments of EP ranks 0, 1 ..., with what each has of its own."""
    made = []
    for rank, change in enumerate(changes):
        generation = change.pop("generation", 5)
        shape = msgspec.structs.replace(SHAPE, **change)
        made.append(RankSegment.create(session, shape, rank, generation))
        made[-1].publish()
    return made


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"generation": 6}, "is of generation 6, rank 0 of 5: an engine is starting, or left it"),
        ({"ring_slots": 9}, "describes another group than that of rank 0; restart the engine"),
    ],
)
def test_ranks_of_two_groups_are_no_group(session, change, reason):
    ranks = group(session, {}, change)
    with pytest.raises(SegmentError) as error:
        check_group(ranks)
    assert f"shared memory {rank_name(session, 1)} {reason}" in str(error.value)
    for rank in ranks:
        rank.close()


def test_a_stranger_among_the_ranks_leaves_the_others_as_they_are(path, session):
    (rank,) = group(session, {})
    stranger = f"/dev/shm{rank_name(session, 1)}"
    put(stranger, segment_of(header_of("b", rank=1)))
    before = state(path), state(stranger)
    with pytest.raises(SegmentError, match=f"{rank_name(session, 1)} was made as"):
        Group.attach(session)
    assert (state(path), state(stranger)) == before
    os.unlink(stranger)
    rank.close()


def test_ranks_of_one_group_are_a_group(session):
    ranks = group(session, {}, {})
    check_group(ranks)
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize("word", [17, 4, -1])
def test_status_shows_a_state_that_is_none_by_its_number(session, word):
    ranks = group(session, {}, {})
    for rank in ranks:
        rank.status[Field.STATE] = word
    result = CliRunner().invoke(app, ["status", "--session", session])
    assert result.exit_code == 0
    assert result.stdout.count(f"unknown ({word})") == 2
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize("count", [-1, -4096, -5000, -(2**63)])
def test_fewer_timings_than_none_are_none(count):
    body = np.ones(StepTimings.SIZE, np.uint8)
    body[:8].view("<i8")[0] = count
    assert StepTimings(body).read().shape == (0, 2)


@pytest.mark.parametrize(
    ("epoch", "change", "trouble"),
    [
        (-1, (0, 1, 2, 1), "epoch -1"),
        (-(2**63), (0, 1, 2, 1), f"epoch {-(2**63)}"),
        (3, (0, 1, 2, 5), "layer 0: rank 1 slot 2 holds expert 5; experts are 0..4"),
        (3, (1, 0, 1, -1), "layer 1: rank 0 slot 1 holds expert -1; experts are 0..4"),
        (3, (1, 0, 1, 0), "layer 1: expert 0 stands twice on rank 0"),
        (3, (0, 1, 0, 0), "layer 0: expert 3 has no slot"),
    ],
)
def test_boards_that_no_loader_writes_are_not_relied_on(session, caplog, epoch, change, trouble):
    ranks = group(session, {}, {})
    found = Group.attach(session)
    placement = PLACEMENT.copy()
    placement[change[:3]] = change[3]
    for rank in ranks:
        rank.board.write(epoch, placement)
    for _ in range(3):
        assert found.committed() is None
    assert [record.getMessage() for record in caplog.records] == [
        f"the placement boards are damaged: {trouble}; nothing is planned from them, restart the "
        "engine"
    ]
    for rank in ranks:
        rank.board.write(4, PLACEMENT)
    epoch, shown = found.committed()
    assert (epoch, shown.tolist()) == (4, PLACEMENT.tolist())
    for rank in [found, *ranks]:
        rank.close()


def queue(limit=100):
    body = np.zeros(PlanQueue.size(limit), np.uint8)
    return body[: len(body) // 8 * 8].view("<i8"), PlanQueue(body, limit)


@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize("ahead", [SLOTS + 1, -1, 2**31, 2**62, 2**63 - 4, 4 - 2**63])
def test_a_head_that_no_planner_writes_is_refused_once(tail, ahead):
    words, plans = queue()
    for _ in range(tail):
        plans.put(b"x")
        plans.get()
    words[0] = tail + ahead
    assert plans.is_full()
    with pytest.raises(RoundError) as error:
        plans.get()
    assert str(error.value) == (
        f"{ahead} records wait in a plan queue that holds {SLOTS}; they are dropped"
    )
    assert not plans.has_record()
    if tail + ahead < 2**63 - 1:
        plans.put(b"next")
        assert plans.get() == b"next"
    else:
        assert plans.is_full()  # its head cannot move on


def test_nothing_is_got_from_an_empty_queue():
    _, plans = queue()
    with pytest.raises(RoundError, match=r"^0 records wait"):
        plans.get()
    assert not plans.has_record()


@pytest.mark.parametrize("written", [1, 2])
def test_a_loader_refuses_records_of_the_next_version_and_of_the_last(monkeypatch, written):
    _, plans = queue()
    monkeypatch.setattr(plan_queue, "RECORD_VERSION", written)
    plans.put(b"x")
    monkeypatch.setattr(plan_queue, "RECORD_VERSION", 3 - written)
    with pytest.raises(RoundError) as error:
        plans.get()
    assert str(error.value) == (
        f"record version {written}, this loader reads {3 - written}; "
        "run the same flash_eplb in the workers and the planner"
    )


def test_a_round_with_one_field_more_or_less_is_refused():
    fields = ["Round", 1, 1, 1, True, 0, 2, 2, 3, b"", b"", b""]
    decode_round(msgspec.msgpack.encode(fields))
    for other, reason in [(fields[:-3], "at least length 10"), ([*fields, 1], "at most length")]:
        with pytest.raises(RoundError, match=reason):
            decode_round(msgspec.msgpack.encode(other))


def test_what_is_said_of_a_record_is_short_and_fit_for_a_terminal():
    with pytest.raises(RoundError) as error:
        decode_round(msgspec.msgpack.encode(["\x1b[2J\n" * 10**5, *[1] * 9]))
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300
