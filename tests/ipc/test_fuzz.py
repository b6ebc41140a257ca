import math
import mmap
import os
import random
import secrets
import struct
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import fuzz
from fuzz_targets import BODY, TARGETS, headers

from flash_eplb.ipc.liveness import SegmentError
from flash_eplb.ipc.names import rank_name
from flash_eplb.ipc.rank_segment import RankSegment
from flash_eplb.ipc.round import RoundError
from flash_eplb.ipc.round_log import RoundLog
from flash_eplb.ipc.segment import aligned

FUZZ = Path(fuzz.__file__)
SHARES = {"header": 0.35, "record": 0.35, "status": 0.18, "queue": 0.06, "ring": 0.04, "log": 0.02}


def run_child(mark, command, timeout):
    """Run fuzz.py in a child, which may die of its input; returns the inputs it ran."""
    mark.write_bytes(bytes(16))
    child = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=timeout
    )
    lines = child.stdout.split()
    if child.returncode:
        seed, number = struct.unpack("<qq", mark.read_bytes())
        pytest.fail(
            f"{lines[-1]}, seed {seed}, input {number}: exit code {child.returncode}; see it with "
            f"`python tests/ipc/fuzz.py --input {lines[-1]} {seed} {number}`\n"
            f"{child.stderr[-3000:]}"
        )
    return sum(map(int, lines[1::2]))


@pytest.mark.soak
def test_of_ten_million_inputs_each_is_accepted_or_refused(amount, tmp_path):
    total, first = amount(25_000, 10_000_000), amount(0, secrets.randbits(32))
    jobs = [
        f"{name}:{first}:{math.ceil(total * share / fuzz.BATCH)}" for name, share in SHARES.items()
    ]
    mark = tmp_path / "mark"
    done = run_child(mark, [FUZZ, mark, *jobs], timeout=amount(200, 3 * 3600))
    assert set(SHARES) == set(TARGETS)
    assert done >= total


REACHED = {
    "header": [
        "accepted",
        "has a damaged header; restart its owner",
        "has layout",
        "describes no rank",
        "experts on",
        "row_bytes has",
        "it says rank",
        "counting names rank",
        "has got this name since",
        "bytes after its header",
    ],
    "record": [
        "accepted",
        "not a round",
        "made for (layers, ranks, slots)",
        "it moves nothing",
        "bytes of moves are no multiple",
        "it must be in",
        "not expert",
        "already",
        "both write",
        "has no slot",
        "stands twice",
        "bytes of routing columns for",
        "routing columns; it must have",
        "routing columns; the table holds",
    ],
    "queue": ["0 taken, 0 refused", "4 taken, 0 refused", "0 taken, 4 refused"],
    "status": ["accepted", "no board", "epoch below zero", "experts are", "stands twice"],
    "ring": ["0 read", "8 read"],
    "log": ["0 read", "5 read", f"{RoundLog.CAPACITY} read"],
}


@pytest.mark.parametrize("name", TARGETS)
def test_the_inputs_come_to_every_check(name):
    found = {fuzz.outcome(TARGETS[name], content) for content in fuzz.inputs(TARGETS[name], 0)}
    missing = [part for part in REACHED[name] if not any(part in text for text in found)]
    assert not missing


def planted(action):
    """The target of records with a bug: `action` for rounds without moves."""

    def run(content):
        try:
            return TARGETS["record"].run(content)
        except RoundError as error:
            if "it moves nothing" in str(error):
                action()
            raise

    return TARGETS["record"]._replace(run=run)


def test_an_exception_that_is_not_ours_is_told_with_seed_number_and_bytes(monkeypatch, capsys):
    monkeypatch.setitem(TARGETS, "planted", planted(lambda: [][0]))
    with pytest.raises(AssertionError, match=r"^planted, seed 3, input \d+: IndexError: ") as error:
        fuzz.run_batch("planted", 3)
    told, content = str(error.value).split("; bytes ")
    number = int(told.split("input ")[1].split(":")[0])
    with pytest.raises(IndexError):
        fuzz.show("planted", 3, number)
    assert capsys.readouterr().out == f"{content}\n"


@pytest.mark.parametrize("text", ["two\nlines", "\x1b[2J", "x" * 500])
def test_a_refusal_that_is_no_line_for_a_terminal_is_told(text):
    def run(_):
        raise RoundError(text)

    with pytest.raises(AssertionError, match=r"is not one line|is too long"):
        fuzz.outcome(TARGETS["record"]._replace(run=run), b"")


CRASHING = f"""
import os, signal, sys
sys.path.insert(0, {str(FUZZ.parent)!r})
import fuzz, test_fuzz
fuzz.TARGETS["planted"] = test_fuzz.planted(lambda: os.kill(os.getpid(), signal.SIGKILL))
fuzz.main(*sys.argv[1:])
"""


def test_a_crash_is_told_with_seed_and_number(tmp_path):
    mark = tmp_path / "mark"
    with pytest.raises(pytest.fail.Exception) as error:
        run_child(mark, ["-c", CRASHING, mark, "header:8:1", "planted:4:2"], timeout=100)
    text = str(error.value)
    assert text.startswith("planted, seed 4, input ")
    assert "exit code -9; see it with `python tests/ipc/fuzz.py --input planted 4 " in text
    number = int(text.split("input ")[1].split(":")[0])
    content = next(islice(fuzz.inputs(TARGETS["record"], 4), number, None))
    with pytest.raises(RoundError, match="it moves nothing"):
        TARGETS["record"].run(content)


def test_a_mark_tells_the_input_that_runs():
    mark = mmap.mmap(-1, 16)
    fuzz.run_batch("header", 6, mark)
    assert struct.unpack("<qq", mark) == (6, fuzz.BATCH - 1)


@pytest.mark.parametrize("name", TARGETS)
def test_a_seed_gives_the_same_inputs_again_and_another_one_others(name):
    once, again, other = (list(fuzz.inputs(TARGETS[name], seed)) for seed in (5, 5, 6))
    assert once == again
    assert len(once) == fuzz.BATCH
    assert len(set(once) - set(other)) > fuzz.BATCH / 2


@given(st.sampled_from(sorted(TARGETS)), st.binary(max_size=700))
def test_any_bytes_are_accepted_or_refused(name, content):
    fuzz.outcome(TARGETS[name], content)


EDITS = st.lists(
    st.tuples(st.integers(0, 2000), st.one_of(st.binary(max_size=8), st.sampled_from(fuzz.WORDS))),
    max_size=6,
)


@pytest.mark.soak
def test_a_valid_input_with_any_edits_is_accepted_or_refused(amount):
    @settings(max_examples=amount(150, 50_000))
    @given(st.data(), st.sampled_from(sorted(TARGETS)), EDITS, st.booleans())
    def check(data, name, edits, repaired):
        content = bytearray(data.draw(st.sampled_from(TARGETS[name].valid)))
        for place, word in edits:
            place %= len(content) + 1
            content[place : place + len(word)] = word
        if repaired:
            TARGETS[name].repair(content)
        fuzz.outcome(TARGETS[name], bytes(content))

    check()


def read_all(rank):
    """Everything that a planner or an observer reads."""
    rank.status.snapshot()
    rank.timings.read()
    rank.rounds.read()
    rank.board.read()
    rank.plans.is_full()
    rank.heat.follow()
    while len(rank.heat.read().steps):
        pass


@pytest.mark.soak
def test_a_file_of_any_header_is_opened_or_refused_and_not_written_to(session, amount):
    name, opened = rank_name(session, 0), 0
    target = TARGETS["header"]._replace(valid=headers(session))
    file = os.open(f"/dev/shm{name}", os.O_RDWR | os.O_CREAT, 0o600)
    for seed in range(amount(1, 40)):
        body = random.Random(seed).randbytes(BODY)
        for number, content in enumerate(islice(fuzz.inputs(target, seed), amount(1000, None))):
            whole = content.ljust(aligned(len(content)), b"\0") + body if number % 8 else content
            os.ftruncate(file, 0)
            os.pwrite(file, whole, 0)
            before = os.fstat(file).st_mtime_ns
            try:
                rank = RankSegment.open(name, writable=True)
                read_all(rank)
                rank.close()
                opened += 1
            except SegmentError:
                pass
            assert os.pread(file, len(whole) + 1, 0) == whole, (seed, number)
            assert os.fstat(file).st_mtime_ns == before, (seed, number)
    os.close(file)
    os.unlink(f"/dev/shm{name}")
    assert opened > 10
