import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_eplb.loaders.copies import SMALL, STREAMED, Copies

DTYPES = [torch.uint8, torch.bool, torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.int64]


def filled(shape, dtype, seed):
    size = int(np.prod(shape))
    cells = np.random.default_rng(seed).integers(0, 2, (max(1, size), dtype.itemsize), np.uint8)
    return torch.from_numpy(cells).view(dtype).ravel()[:size].reshape(shape)


@pytest.fixture
def threads():
    """Sets the threads of torch until the test is over."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@st.composite
def pairs(draw):
    """A tensor to be written within a larger one, and what goes there: views of many kinds."""
    dtype = draw(st.sampled_from(DTYPES))
    rows, columns = draw(st.integers(0, 5)), draw(st.integers(0, 9))
    kind = draw(st.sampled_from(["flat", "whole", "part of rows", "turned", "large"]))
    if kind == "large":
        rows, columns = 3, SMALL // dtype.itemsize // 2
    around = filled((rows + 2, columns + 3), dtype, draw(st.integers(0, 9)))
    source = filled((rows, columns), dtype, draw(st.integers(10, 19)))
    target = around[1 : rows + 1, 2 : columns + 2]
    if kind == "flat":
        return around, around[1, 1 : columns + 1], filled((columns,), dtype, 20)
    if kind == "whole":
        return around, around, filled(around.shape, dtype, 21)
    if kind == "turned":
        return around, target.t(), source.t()
    return around, target, source


@given(st.lists(pairs(), max_size=6))
def test_exactly_what_is_to_be_written_is_written(cases):
    expected = []
    for around, target, source in cases:
        copy = around.clone()
        place = copy.as_strided(target.shape, target.stride(), target.storage_offset())
        place.copy_(source)
        expected.append(copy)
    Copies([target for _, target, _ in cases], [source for *_, source in cases]).run()
    for (around, *_), copy in zip(cases, expected, strict=True):
        assert torch.equal(around, copy)


@given(
    st.lists(
        st.tuples(st.integers(0, 3 * STREAMED), st.integers(0, 70), st.integers(0, 70)), max_size=4
    )
)
def test_lines_are_streamed_from_and_to_any_address(cases):
    rooms, live, staged = [], [], []
    for number, (size, to, since) in enumerate(cases):
        room = filled((size + 200,), torch.uint8, number)
        source = filled((size + 200,), torch.uint8, number + 100)[since : since + size]
        rooms.append((room, torch.cat([room[:to], source, room[to + size :]])))
        live.append(room[to : to + size])
        staged.append(source)
    Copies(live, staged).run()
    assert all(torch.equal(room, wanted) for room, wanted in rooms)


def test_the_values_of_the_commit_are_written_not_those_of_its_preparation():
    live, staged = torch.zeros(8), torch.zeros(8)
    copies = Copies([live], [staged])
    staged += 1
    copies.run()
    assert (live == 1).all()


def test_what_is_to_be_copied_lives_as_long_as_its_addresses_are_kept():
    def prepared():
        return Copies([live], [torch.full((4096,), 7, dtype=torch.uint8)])

    live = torch.zeros(4096, dtype=torch.uint8)
    copies = prepared()
    others = [torch.full((4096,), 9, dtype=torch.uint8) for _ in range(100)]
    copies.run()
    assert (live == 7).all()
    assert len(others) == 100


def test_a_tensor_that_got_other_memory_is_written_there():
    live = torch.zeros(4096, dtype=torch.uint8)
    copies = Copies([live[:2048]], [torch.ones(2048, dtype=torch.uint8)])
    live.share_memory_()
    others = [torch.zeros(4096, dtype=torch.uint8) for _ in range(8)]  # one where it was, maybe
    copies.run()
    assert (live[:2048] == 1).all()
    assert not any(other.any() for other in others)


@pytest.mark.parametrize("how", ["data", "set_"])
def test_a_tensor_that_stands_for_other_memory_is_written_there(how):
    live, new = torch.zeros(4096, dtype=torch.uint8), torch.zeros(4096, dtype=torch.uint8)
    old = live.detach()
    copies = Copies([live], [torch.ones(4096, dtype=torch.uint8)])
    if how == "data":
        live.data = new
    else:
        live.set_(new)
    copies.run()
    assert (live == 1).all()
    assert (new == 1).all()
    assert not old.any()


def test_each_of_two_storages_of_the_same_memory_is_followed():
    memory = np.zeros(4096, np.uint8)
    pair = [torch.from_numpy(memory[:]) for _ in range(2)]
    copies = Copies([pair[0][:2048], pair[1][2048:]], [torch.ones(2048, dtype=torch.uint8)] * 2)
    pair[0].share_memory_()
    copies.run()
    assert (pair[0][:2048] == 1).all()
    assert (pair[1][2048:] == 1).all()
    assert not memory[:2048].any()


@pytest.mark.parametrize("large", [False, True])
def test_it_does_not_matter_in_which_mode_tensors_were_made(large, threads):
    threads(2)
    size = SMALL + 1 if large else 8
    parameter = torch.nn.Parameter(torch.zeros(size))
    with torch.inference_mode():
        inferred = torch.zeros(size)
    Copies([parameter, inferred], [torch.ones(size)] * 2).run()
    assert (parameter == 1).all()
    assert (inferred == 1).all()
    assert parameter.requires_grad


def test_tensors_of_two_shapes_are_refused_before_anything_is_written():
    live = torch.zeros(3)
    with pytest.raises(ValueError, match=r"^\(1,\) cannot be written over \(4,\)$"):
        Copies([live, torch.zeros(4)], [live + 1, torch.ones(1)])
    assert not live.any()


def test_a_view_that_torch_resolves_as_it_copies_is_left_to_it():
    live, source = torch.zeros(2, dtype=torch.complex64), torch.tensor([1j, 2 - 1j])
    Copies([live], [source.conj()]).run()
    assert live.tolist() == [-1j, 2 + 1j]


def test_only_large_tensors_are_left_to_torch_and_only_if_it_has_several_threads(
    monkeypatch, threads
):
    def refuse(*_):
        raise AssertionError("a call of torch")

    monkeypatch.setattr(torch, "_foreach_copy_", refuse)
    threads(2)
    table, flat = torch.full((4, 1024), -1), torch.zeros(SMALL, dtype=torch.uint8)
    Copies([table[:, :3], flat], [torch.ones((4, 3), dtype=torch.int64), flat + 1]).run()
    assert (table[:, :3] == 1).all()
    assert (table[:, 3:] == -1).all()
    assert (flat == 1).all()
    large = torch.zeros(SMALL + 1, dtype=torch.uint8)
    with pytest.raises(AssertionError, match="a call of torch"):
        Copies([large], [large + 1]).run()
    threads(1)
    Copies([large], [large + 1]).run()
    assert (large == 1).all()


def test_another_dtype_is_converted():
    live = torch.zeros(3, dtype=torch.int32)
    Copies([live], [torch.tensor([1, 2, 3])]).run()
    assert live.tolist() == [1, 2, 3]


def test_as_many_must_go_as_are_written():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        Copies([torch.zeros(1)], [])
