import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_eplb.ipc.ballot_box import WORDS, BallotBox
from flash_eplb.loaders import vote as vote_module
from flash_eplb.loaders.vote import Ballot, Outcome, Vote, to_outcome, to_words

IDENTITIES = st.one_of(st.sampled_from([0, 1, 2, 2**63 - 1]), st.integers(1, 2**63 - 1))
BALLOTS = st.builds(
    Ballot,
    candidate=IDENTITIES,
    staged=st.booleans(),
    failed=st.booleans(),
    failed_us=st.sampled_from([0, 1, 10**12, 2**50 - 1]),
    mismatch=st.booleans(),
    changed=st.booleans(),
    stopped=st.booleans(),
    epoch=st.sampled_from([0, 0, 0, 1, 2**40]),
)


def counted(ballots):
    """What comes out of the reduction over all ranks."""
    words = [to_words(ballot, rank) for rank, ballot in enumerate(ballots)]
    assert all(-(2**63) <= word < 2**63 for row in words for word in row)
    assert {len(row) for row in words} == {WORDS}
    return to_outcome([min(column) for column in zip(*words, strict=True)])


def highest(said):
    """The highest rank that said it, or -1."""
    return max((rank for rank, yes in enumerate(said) if yes), default=-1)


@given(st.lists(BALLOTS, min_size=1, max_size=5), st.booleans())
def test_the_outcome_is_what_the_ballots_say(ballots, agree):
    if agree:  # all about the same candidate
        ballots = [ballot._replace(candidate=ballots[0].candidate) for ballot in ballots]
    candidates = {ballot.candidate for ballot in ballots}
    first = min((ballot.failed_us for ballot in ballots if ballot.failed), default=0)
    assert counted(ballots) == Outcome(
        start=candidates.pop() if len(candidates) == 1 else 0,
        staged=all(ballot.staged for ballot in ballots),
        failed_rank=highest(ballot.failed and ballot.failed_us == first for ballot in ballots),
        mismatch_rank=highest(ballot.mismatch for ballot in ballots),
        changed_rank=highest(ballot.changed for ballot in ballots),
        stopped_rank=highest(ballot.stopped for ballot in ballots),
        diverged=len({ballot.epoch for ballot in ballots}) > 1,
    )


def test_empty_ballots_decide_nothing():
    assert counted([Ballot()] * 3) == Outcome(0, False, -1, -1, -1, -1, False)


def test_a_round_starts_only_if_all_name_it():
    assert counted([Ballot(7), Ballot(7), Ballot(7)]).start == 7
    assert counted([Ballot(7), Ballot(), Ballot(7)]).start == 0
    assert counted([Ballot(7), Ballot(8), Ballot(7)]).start == 0


def test_the_rank_that_said_it_is_known():
    said = ["failed", "stopped", "mismatch", "changed"]
    outcome = counted([Ballot(), *(Ballot(**{name: True}) for name in said)])
    assert [getattr(outcome, f"{name}_rank") for name in said] == [1, 2, 3, 4]


@pytest.fixture
def votes():
    """Three ranks' votes over one box; rank 2 counts as dead once it is in `dead`."""
    body, dead = np.zeros(BallotBox.size(3), np.uint8), set()
    made = [
        Vote(BallotBox(body, 3), rank, lambda rank: "is dead" * (rank in dead), patience=2.0)
        for rank in range(3)
    ]
    return made, dead


def test_every_vote_gives_all_ranks_the_same_outcome(votes):
    ranks, _ = votes
    for number in range(1, 50):
        for rank, vote in enumerate(ranks):
            vote.issue(Ballot(number, staged=True, failed=rank == number % 5))
        outcomes = [vote.consume() for vote in ranks]
        assert outcomes[0] == outcomes[1] == outcomes[2]
        assert outcomes[0].start == number
        assert outcomes[0].failed_rank == (number % 5 if number % 5 < 3 else -1)


def test_before_the_first_vote_there_is_no_outcome(votes):
    assert votes[0][0].consume() is None


def test_a_rank_that_is_late_is_waited_for_and_named(votes, caplog, monkeypatch):
    monkeypatch.setattr(vote_module, "_QUIET_SECONDS", 0.05)
    (first, second, late), _ = votes
    for vote in (first, second):
        vote.issue(Ballot(7))
    timer = threading.Timer(0.2, lambda: late.issue(Ballot(7)))
    timer.start()
    assert first.consume().start == 7
    assert "EP rank 0 has waited 0 s for the vote of EP rank 2" in caplog.text


def test_a_rank_that_is_dead_is_not_waited_for(votes, monkeypatch):
    monkeypatch.setattr(vote_module, "_LOOK_SECONDS", 0.02)
    (first, second, _), dead = votes
    for vote in (first, second):
        vote.issue(Ballot())
    dead.add(2)
    with pytest.raises(RuntimeError, match="EP rank 2 is dead, so vote 1 is closed on all ranks"):
        first.consume()


def test_patience_ends(votes, monkeypatch):
    monkeypatch.setattr(vote_module, "_LOOK_SECONDS", 0.1)
    (first, _, third), _ = votes
    for vote in (first, third):
        vote.issue(Ballot())
    with pytest.raises(RuntimeError, match="EP rank 1 has not voted for 2 s, so vote 1 is closed"):
        first.consume()


def test_a_vote_that_was_given_up_is_acted_on_by_no_rank(votes, monkeypatch):
    """Not by the one that waits still, and not by the one that was late."""
    monkeypatch.setattr(vote_module, "_LOOK_SECONDS", 0.02)
    ranks, dead = votes
    for vote in ranks:
        vote.issue(Ballot(7))
    assert [vote.consume().start for vote in ranks] == [7] * 3
    for vote in ranks[:2]:
        vote.issue(Ballot())
    dead.add(2)  # taken for dead, and alive
    with pytest.raises(RuntimeError, match="so vote 2 is closed on all ranks"):
        ranks[0].consume()
    dead.clear()
    ranks[2].issue(Ballot())
    for vote in ranks[1:]:
        with pytest.raises(RuntimeError, match=r"^vote 2 was closed by a rank"):
            vote.consume()


def test_a_vote_on_which_others_have_acted_is_not_given_up(votes, monkeypatch):
    """The rank that is late votes, and another one acts on it, just before it is given up."""
    monkeypatch.setattr(vote_module, "_LOOK_SECONDS", 0.02)
    (first, second, late), _ = votes
    for vote in (first, second):
        vote.issue(Ballot(7))
    close, acted = first._box.close, []

    def close_too_late(number):
        late.issue(Ballot(7))
        acted.append(second.consume().start)
        return close(number)

    first._why_silent = lambda rank: "is dead" * (rank == 2)
    first._box.close = close_too_late
    assert first.consume().start == 7
    assert acted == [7]


def test_a_look_that_fails_is_no_death(votes, monkeypatch):
    monkeypatch.setattr(vote_module, "_LOOK_SECONDS", 0.02)
    (first, second, late), _ = votes

    def fail(rank):
        raise OSError("too many open files")

    first._why_silent = fail
    for vote in (first, second):
        vote.issue(Ballot(7))
    threading.Timer(0.1, lambda: late.issue(Ballot(7))).start()
    assert first.consume().start == 7


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_a_jump_of_the_clock_uses_up_no_patience(votes, monkeypatch, jump):
    """So does a container that was paused for an hour: nobody was waited for meanwhile."""
    (first, second, late), _ = votes
    for vote in (first, second):
        vote.issue(Ballot(7))
    begin, clock = time.monotonic(), time.monotonic

    def jumped():
        now = clock()
        return now + jump if now - begin > 0.05 else now

    monkeypatch.setattr(vote_module.time, "monotonic", jumped)
    threading.Timer(0.3, lambda: late.issue(Ballot(7))).start()
    assert first.consume().start == 7
