import threading

import pytest
import torch.distributed as dist

from flash_eplb.eplb.meeting import MeetingError, meet


def all_meet(store, name, delays, patience=5.0):
    """Each rank comes after its delay (None: never); returns what each got."""
    found = {}

    def come(rank, delay):
        threading.Event().wait(delay)
        try:
            meet(store, name, rank, len(delays), patience)
            found[rank] = ""
        except MeetingError as error:
            found[rank] = str(error)

    threads = [
        threading.Thread(target=come, args=(rank, delay))
        for rank, delay in enumerate(delays)
        if delay is not None
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_all_come_back_when_the_last_has_come():
    assert all_meet(dist.HashStore(), "m", [0, 0.05, 0.02]) == {0: "", 1: "", 2: ""}


def test_a_rank_that_does_not_come_is_named_to_all_that_did():
    store = dist.HashStore()
    found = all_meet(store, "m", [0, None, 0.05], patience=0.2)
    assert found[0] == found[2]
    assert "has waited 0.2 s for EP ranks [1] in vain" in found[0]
    # the next try is a new meeting, also for the rank that was not there
    assert all_meet(store, "m", [0, 0.01, 0.02]) == {0: "", 1: "", 2: ""}


def test_who_is_late_waits_for_a_new_meeting():
    store = dist.HashStore()
    with pytest.raises(MeetingError, match=r"EP rank 0 .* EP ranks \[1\]"):
        meet(store, "m", 0, 2, 0.05)
    with pytest.raises(MeetingError, match=r"EP rank 1 .* EP ranks \[0\]"):
        meet(store, "m", 1, 2, 0.05)


@pytest.mark.parametrize("turn", range(30))
def test_met_or_not_is_the_same_for_all(turn):
    """The last rank comes just as the first one loses patience."""
    found = all_meet(dist.HashStore(), "m", [0, 0.02], patience=0.02)
    assert len({bool(text) for text in found.values()}) == 1 or found[1]
    assert (found[0] == "") == (found[1] == "")
