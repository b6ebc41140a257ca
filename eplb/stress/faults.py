"""Faults: what goes wrong on purpose, and what must hold while it does.

Each is a generator that yields while it waits, raises `TrialError` where something does not hold,
and is followed by `Trial.resumes`.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from ...ipc.placement import MOVE
from ...ipc.round import Round, encode_round
from ...ipc.status import Field
from .figures import Order, Planned, Rank
from .trial import Trial, TrialError, Waiting

_PAUSE = 1.0  # seconds for which something is gone or slow
_HOUR = 3_600_000_000_000
_SLOW_NS = 20_000_000
_FILLED = Path("/dev/shm/filled")


def planner_killed(trial: Trial) -> Waiting:
    """SIGKILL while it plans or delivers; the steps go on, and a successor resumes."""
    plans = trial.told(Planned.PLANS)
    trial.shuffle()
    for _ in trial.pause(4 * _PAUSE):
        if trial.told(Planned.PLANS) > plans:
            break
        yield
    trial.kill_planner()
    yield from trial.steps_on(8)
    yield from trial.pause(_PAUSE)
    trial.fleet.start_planner()


def planner_frozen(trial: Trial) -> Waiting:
    """SIGSTOP for a second and more: the steps go on, and it catches up."""
    planner = trial.fleet.planner
    assert planner is not None
    target = trial.fleet.slowest() + 32
    lost = trial.told(Planned.LOST)
    yield from trial.freeze(
        planner.pid, lambda: trial.fleet.slowest() >= target, "the ranks did not go on stepping"
    )
    yield from _caught_up(trial)
    trial.excused += trial.told(Planned.LOST) - lost


def rank_slow(trial: Trial) -> Waiting:
    """A rank that lags, then does not run at all for a while: nobody gives it up."""
    order, rank = trial.fleet.figures.order, _some_rank(trial)
    order[Order.SLOW_NS], order[Order.SLOW_RANK] = _SLOW_NS, rank + 1
    trial.stopped = True
    yield from trial.pause(_PAUSE)
    order[Order.SLOW_RANK] = 0
    steps: list[int] = []

    def stands_still() -> bool:
        steps.append(trial.fleet.steps())
        return len(steps) > 20 and len(set(steps[-20:])) == 1

    pid = int(trial.fleet.figures.ranks[rank, Rank.PID])
    yield from trial.freeze(pid, stands_still, "the other ranks did not wait for a stopped one")
    yield from trial.steps_on(8)
    trial.stopped = False


def rank_killed(trial: Trial) -> Waiting:
    """SIGKILL; the others name it and stop balancing; the engine starts again, in its session."""
    fleet, rank = trial.fleet, _some_rank(trial)
    host = next(n for n in range(fleet.setup.hosts) if rank in fleet.setup.ranks_of(n))
    others = [n for n in range(fleet.setup.ranks) if n not in fleet.setup.ranks_of(host)]
    trial.stopped = True
    fleet.lose(host)
    if others and not fleet.setup.weights:  # real ranks hang in the engine's own collectives
        told = fleet.figures.ranks[others, Rank.STOPPED]
        yield from trial.until(
            lambda: bool(fleet.figures.ranks[others, Rank.STOPPED].all()),
            f"ranks {np.array(others)[told == 0].tolist()} did not stop balancing",
        )
        step = int(fleet.figures.ranks[others, Rank.STEP].min())
        yield from trial.until(
            lambda: int(fleet.figures.ranks[others, Rank.STEP].min()) > step + 8,
            "the ranks that live did not go on stepping",
        )
    serving = trial.told(Planned.SERVING)
    fleet.stop_ranks()
    trial.leave_engine()
    trial.start_engine()
    yield
    trial.stopped = False
    yield from trial.until(
        lambda: trial.told(Planned.SERVING) > serving, "the planner did not find the new engine"
    )


def ring_overrun(trial: Trial) -> Waiting:
    """The planner does not read until the rings have gone round: it counts what it lost."""
    planner, lost = trial.fleet.planner, trial.told(Planned.LOST)
    assert planner is not None
    target = trial.fleet.slowest() + trial.config.ring_steps + 64
    yield from trial.freeze(
        planner.pid, lambda: trial.fleet.slowest() >= target, "the rings did not go round"
    )
    yield from _caught_up(trial)
    more = trial.told(Planned.LOST) - lost
    if not more:
        raise TrialError("the planner counted no loss although its rings were overrun")
    trial.excused += more


def corrupt_plans(trial: Trial) -> Waiting:
    """A planner gone mad: noise, a flipped bit, plans that must not be. All are refused."""
    fleet, group = trial.fleet, trial.fleet.group
    assert group is not None
    trial.kill_planner()
    yield from trial.steps_on(4 * trial.config.vote_steps + 8)  # what it had sent is through
    for rank in group.ranks:
        rank.plans.take_over(0)
    yield from trial.steps_on(4 * trial.config.vote_steps + 8)
    board = group.committed()
    if board is None:
        raise TrialError("the ranks' boards do not agree")
    generation = trial.chance.getrandbits(61) | 1
    for rank in group.ranks:
        rank.plans.take_over(generation)
    for number, (record, checksum) in enumerate(_bad_records(trial, generation, *board)):
        before = fleet.total(Field.REFUSED) + fleet.total(Field.STALE)
        for rank in group.ranks:
            rank.plans.append(record, checksum)
        wanted = before + len(group.ranks)
        yield from trial.until(
            lambda wanted=wanted: (  # type: ignore[misc]
                fleet.total(Field.REFUSED) + fleet.total(Field.STALE) >= wanted
            ),
            f"bad record {number} was not refused by every rank",
        )
    yield from trial.steps_on(4 * trial.config.vote_steps + 8)
    after = group.committed()
    if after is None or after[0] != board[0] or (after[1] != board[1]).any():
        raise TrialError("a bad plan has changed the placement")
    fleet.start_planner()


def _bad_records(
    trial: Trial, generation: int, epoch: int, placement: np.ndarray
) -> list[tuple[bytes, int]]:
    """Records that a rank must refuse, under the placement of `epoch`, and their checksums."""
    layers, ranks, slots = placement.shape
    good = Round(generation, 1, 1, True, epoch, layers, ranks, slots, b"")
    held, counts = placement[0], np.bincount(placement[0].ravel())
    rank, slot = next((r, s) for r in range(ranks) for s in range(slots) if counts[held[r, s]] == 1)
    other = held[(rank + 1) % ranks, 0]
    gone = np.array([(0, other, (rank + 1) % ranks, 0, rank, slot)], MOVE)
    twin = held[rank, (slot + 1) % slots]
    doubled = np.array([(0, twin, rank, (slot + 1) % slots, rank, slot)], MOVE)
    late = np.array([(0, other, (rank + 1) % ranks, 0, rank, slot)], MOVE)
    gone_round = msgspec.structs.replace(good, moves=gone.tobytes())
    late_round = msgspec.structs.replace(good, plan=4, sequence=4, moves=late.tobytes())
    records = [
        trial.chance.randbytes(300),
        encode_round(gone_round),
        encode_round(msgspec.structs.replace(gone_round, plan=2, sequence=2)),
        encode_round(msgspec.structs.replace(good, plan=3, sequence=3, moves=doubled.tobytes())),
        encode_round(msgspec.structs.replace(late_round, epoch=epoch + 7)),
        encode_round(msgspec.structs.replace(late_round, generation=generation + 2)),
    ]
    checksums = [zlib.crc32(record) for record in records]
    checksums[1] ^= 1 << 9  # a bit that has changed since
    return list(zip(records, checksums, strict=True))


def shm_full(trial: Trial) -> Waiting:
    """No byte is left in /dev/shm: the engine goes on and commits; another one is refused."""
    fleet, epoch = trial.fleet, trial.fleet.epoch()
    _fill(_FILLED)
    try:
        yield from trial.steps_on(32)
        second = fleet.start_second()
        try:
            yield from trial.until(lambda: second.poll() is not None, "a second engine did not end")
        finally:
            second.kill()
            second.wait()
        words = fleet.second_words()
        if "/dev/shm has" not in words:
            raise TrialError(f"a second engine was not refused for want of memory: {words[-300:]}")
        yield from trial.wins(
            lambda: fleet.epoch() > epoch, "no plan was committed with /dev/shm full"
        )
    finally:
        _FILLED.unlink()


def _fill(path: Path) -> None:
    with open(path, "wb") as file:
        try:
            while file.write(bytes(1 << 16)):
                file.flush()
        except OSError:
            os.ftruncate(file.fileno(), file.tell() // 4096 * 4096)


def clock_jumps(trial: Trial) -> Waiting:
    """All clocks an hour ahead, then an hour back: nothing that waits gives up or hangs."""
    order = trial.fleet.figures.order
    for jump in (_HOUR, -_HOUR, 0):
        order[Order.JUMP_NS] = jump
        yield from trial.steps_on(16)
        yield from trial.pause(_PAUSE / 2)


def bit_flips(trial: Trial) -> Waiting:
    """A row arrives with a wrong bit: its round is dropped on all ranks, and counted."""
    fleet, order = trial.fleet, trial.fleet.figures.order
    damaged, rank = fleet.total(Field.DAMAGED), _some_rank(trial)
    aborted = fleet.total(Field.ABORTED)
    order[Order.FLIP_RANK] = rank + 1
    order[Order.FLIPS] += 1
    told = fleet.figures.ranks[rank]
    yield from trial.wins(
        lambda: bool(told[Rank.FLIPPED] == order[Order.FLIPS]), f"no row came to rank {rank}"
    )
    order[Order.FLIP_RANK] = 0
    if told[Rank.FLIPPED] != order[Order.FLIPS]:
        return  # nothing moves in this scenario
    yield from trial.until(
        lambda: fleet.total(Field.DAMAGED) > damaged, "a wrong bit was not noticed"
    )
    yield from trial.until(
        lambda: fleet.total(Field.ABORTED) >= aborted + fleet.setup.ranks,
        "the round with a wrong bit was not dropped on all ranks",
    )


def _some_rank(trial: Trial) -> int:
    return trial.chance.randrange(trial.fleet.setup.ranks)


def _caught_up(trial: Trial) -> Waiting:
    step = trial.fleet.steps()
    yield from trial.until(lambda: trial.told(Planned.STEP) >= step, "the planner took no new heat")


FAULTS: dict[str, tuple[Callable[[Trial], Waiting], str]] = {
    "planner-killed": (planner_killed, "SIGKILL while it plans; another one takes over"),
    "planner-frozen": (planner_frozen, "SIGSTOP; steps go on, and it catches up"),
    "rank-slow": (rank_slow, "a rank lags, then stands still; the others wait"),
    "rank-killed": (rank_killed, "SIGKILL; the engine starts again in its session"),
    "ring-overrun": (ring_overrun, "the planner does not read until the rings have gone round"),
    "corrupt-plans": (corrupt_plans, "noise and plans that must not be, in every queue"),
    "shm-full": (shm_full, "/dev/shm, a small private one, is filled to the last byte"),
    "clock-jumps": (clock_jumps, "all clocks jump an hour ahead and an hour back"),
    "bit-flips": (bit_flips, "a row arrives with a wrong bit"),
}
"""By name: the fault and what it does."""
