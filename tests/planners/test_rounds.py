import numpy as np

from flash_eplb.planners.rounds import spread_sources


def sources(current, writes, experts, near, sent):
    writes, experts = np.array(writes), np.array(experts, np.int32)
    return spread_sources(np.array(current, np.int32), writes, experts, near, sent)


def test_sends_of_one_round_are_even_whatever_was_sent_before():
    current = [[[0, 1], [1, 0], [2, 3], [4, 5]]]
    sent = np.array([5, 0, 0, 0])
    found = sources(current, [(0, 2, 0), (0, 3, 0)], [0, 1], 4, sent)
    assert found.tolist() == [[1, 1], [0, 1]]
    assert sent.tolist() == [6, 1, 0, 0]


def test_of_equal_ranks_the_one_that_sent_least_before_sends():
    current = [[[0, 1], [1, 0], [2, 3]]]
    for sent, source in (([0, 1, 0], 0), ([1, 0, 0], 1)):
        assert sources(current, [(0, 2, 0)], [0], 3, np.array(sent))[0, 0] == source


def test_an_expert_with_one_holder_is_served_before_one_with_a_choice():
    current = [[[0, 1], [0, 2], [3, 4]]]
    found = sources(current, [(0, 2, 0), (0, 2, 1)], [0, 1], 3, np.zeros(3, np.int64))
    assert found.tolist() == [[1, 0], [0, 1]]
