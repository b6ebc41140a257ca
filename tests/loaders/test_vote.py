from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from flash_eplb.loaders.vote import _WORDS, Ballot, Outcome, to_outcome, to_words

IDENTITIES = st.one_of(st.sampled_from([0, 1, 2, 2**63 - 1]), st.integers(1, 2**63 - 1))
BALLOTS = st.builds(
    Ballot,
    candidate=IDENTITIES,
    staged=st.booleans(),
    failed=st.booleans(),
    mismatch=st.booleans(),
    changed=st.booleans(),
    stopped=st.booleans(),
    epoch=st.sampled_from([0, 0, 0, 1, 2**40]),
)


def counted(ballots):
    """What comes out of the reduction over all ranks."""
    words = [to_words(ballot, rank) for rank, ballot in enumerate(ballots)]
    assert all(-(2**63) <= word < 2**63 for row in words for word in row)
    assert {len(row) for row in words} == {_WORDS}
    return to_outcome([min(column) for column in zip(*words, strict=True)])


def highest(said):
    """The highest rank that said it, or -1."""
    return max((rank for rank, yes in enumerate(said) if yes), default=-1)


@given(st.lists(BALLOTS, min_size=1, max_size=5), st.booleans())
def test_the_outcome_is_what_the_ballots_say(ballots, agree):
    if agree:  # all about the same candidate
        ballots = [replace(ballot, candidate=ballots[0].candidate) for ballot in ballots]
    candidates = {ballot.candidate for ballot in ballots}
    assert counted(ballots) == Outcome(
        start=candidates.pop() if len(candidates) == 1 else 0,
        staged=all(ballot.staged for ballot in ballots),
        failed_rank=highest(ballot.failed for ballot in ballots),
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
