import pytest

from flash_eplb.ipc.names import bell_name, check_session, planner_name, rank_name


@pytest.mark.parametrize("session", ["a", "default", "A-1_b", "x" * 32])
def test_a_good_session_is_returned(session):
    assert check_session(session) == session


@pytest.mark.parametrize("session", ["", "x" * 33, "a.b", "a/b", "a b", "é", "a\n", "../a", "٣"])
def test_a_bad_session_is_named(session):
    with pytest.raises(ValueError) as error:
        check_session(session)
    assert str(error.value) == f"{session!r} is not 1 to 32 letters, digits, '-' or '_'"


def test_the_names_of_a_session():
    assert rank_name("a", 12) == "/eplb.a.rank.12"
    assert planner_name("a") == "/eplb.a.planner"
    assert bell_name("a") == "/eplb.a.bell"
