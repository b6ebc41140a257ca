import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_eplb.loaders.staging import Staging, digests, row_bytes, row_digest, slot_views

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.bool,
]
TENSORS = st.lists(
    st.tuples(
        st.sampled_from(DTYPES),
        st.one_of(
            st.just(()),
            st.tuples(st.integers(1, 5)),
            st.tuples(st.integers(1, 4), st.integers(1, 3)),
            st.tuples(*[st.integers(1, 3)] * 3),
        ),
    ),
    min_size=1,
    max_size=3,
)
SLOTS = 3


def tensor_of(dtype, shape, seed):
    """A tensor of SLOTS rows with random bytes."""
    size = torch.empty((), dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(seed)
    top = 2 if dtype == torch.bool else 256
    count = SLOTS * size * int(torch.Size(shape).numel())
    content = torch.randint(0, top, (count,), dtype=torch.uint8, generator=generator)
    return content.view(dtype).view(SLOTS, *shape)


def layers_of(*layers):
    return [
        [tensor_of(dtype, shape, 10 * number + place) for place, (dtype, shape) in enumerate(layer)]
        for number, layer in enumerate(layers)
    ]


def snapshot(weights):
    """The bytes of every tensor, [layer][tensor][slot]."""
    return [
        [
            [tensor[slot].contiguous().view(-1).view(torch.uint8).tolist() for slot in range(SLOTS)]
            for tensor in layer
        ]
        for layer in weights
    ]


def fill(views, start):
    """Write bytes that differ from row to row; returns them."""
    content = []
    for view in views:
        numbers = [(start + 7 * place) % 256 for place in range(view.numel())]
        view.copy_(torch.tensor(numbers, dtype=torch.uint8))
        content.append(numbers)
        start += view.numel()
    return content


@given(st.lists(TENSORS, min_size=1, max_size=3))
def test_a_rows_bytes_are_those_of_one_expert(kinds):
    weights = layers_of(*kinds)
    assert row_bytes(weights) == tuple(
        sum(tensor.numel() * tensor.element_size() // SLOTS for tensor in layer)
        for layer in weights
    )


@given(TENSORS)
def test_the_views_are_the_live_bytes(kinds):
    (layer,) = layers_of(kinds)
    for slot in range(SLOTS):
        views = slot_views(layer, slot)
        assert [view.tolist() for view in views] == [held[slot] for held in snapshot([layer])[0]]
        for view, tensor in zip(views, layer, strict=True):
            assert view.dtype == torch.uint8
            assert view.dim() == 1
            assert view.data_ptr() == tensor[slot].data_ptr()
    before = snapshot([layer])
    written = fill(slot_views([t for t in layer if t.dtype != torch.bool], 1), 3)
    for tensor, content in zip([t for t in layer if t.dtype != torch.bool], written, strict=True):
        assert snapshot([[tensor]])[0][0][1] == content
    after = snapshot([layer])
    for old, new in zip(before[0], after[0], strict=True):
        assert (old[0], old[2]) == (new[0], new[2])


@given(st.lists(TENSORS, min_size=1, max_size=3), st.integers(1, 4), st.data())
def test_a_commit_copies_exactly_one_slot(kinds, rows, data):
    weights = layers_of(*kinds)
    staging = Staging(weights, rows)
    assert staging.nbytes == rows * max(row_bytes(weights))
    layer = data.draw(st.integers(0, len(weights) - 1))
    slot = data.draw(st.integers(0, SLOTS - 1))
    row = data.draw(st.integers(0, rows - 1))
    staged = [fill(staging.views(number, layer), 50 * number) for number in range(rows)]
    expected = snapshot(weights)
    for place, content in enumerate(staged[row]):
        expected[layer][place][slot] = content
    staging.commit(row, layer, slot)
    assert snapshot(weights) == expected
    # the rows still hold what they held, and share nothing with the weights
    for number in range(rows):
        assert [view.tolist() for view in staging.views(number, layer)] == staged[number]
    fill(staging.views(row, layer), 99)
    assert snapshot(weights) == expected


@given(TENSORS, st.data())
def test_any_flipped_bit_changes_the_digest(kinds, data):
    (layer,) = layers_of(kinds)
    before = digests([layer])
    views = slot_views(layer, 1)
    view = views[data.draw(st.integers(0, len(views) - 1))]
    place = data.draw(st.integers(0, view.numel() - 1))
    view[place] ^= 1 << data.draw(st.integers(0, 7))
    after = digests([layer])
    assert after[0][1] != before[0][1]
    assert (after[0][0], after[0][2]) == (before[0][0], before[0][2])


def test_equal_bytes_have_equal_digests_wherever_they_lie():
    weights = layers_of([(torch.bfloat16, (4, 3)), (torch.float32, (2,))])
    staging = Staging(weights, 2)
    for staged, live in zip(staging.views(1, 0), slot_views(weights[0], 2), strict=True):
        staged.copy_(live)
    assert row_digest(staging.views(1, 0)) == row_digest(slot_views(weights[0], 2))
    assert row_digest(staging.views(1, 0)) == digests(weights)[0][2]
    staging.commit(1, 0, 0)
    assert digests(weights)[0][0] == digests(weights)[0][2]


def test_a_digest_is_the_crc_of_the_bytes_in_order():
    views = [torch.tensor(list(part), dtype=torch.uint8) for part in (b"1234", b"", b"56789")]
    assert row_digest(views) == 0xCBF43926


def test_an_expert_tensor_without_contiguous_rows_is_refused():
    weights = torch.arange(24.0).view(2, 3, 4).transpose(1, 2)
    with pytest.raises(ValueError, match=r"an expert tensor of shape \(2, 4, 3\) is not contig"):
        slot_views([weights], 0)
    with pytest.raises(ValueError, match="is not contiguous"):
        digests([[weights]])


def test_contiguous_rows_of_a_tensor_with_gaps_will_do():
    wide = torch.arange(24.0).view(4, 6)
    layer = [wide[::2]]
    staging = Staging([layer], 1)
    staging.views(0, 0)[0].copy_(torch.zeros(24, dtype=torch.uint8))
    staging.commit(0, 0, 1)
    assert wide[:, 0].tolist() == [0, 6, 0, 18]


def test_parameters_are_weights_too():
    parameter = torch.nn.Parameter(torch.ones(2, 3), requires_grad=False)
    before = digests([[parameter]])
    staging = Staging([[parameter]], 1)
    fill(staging.views(0, 0), 1)
    staging.commit(0, 0, 1)
    assert digests([[parameter]])[0][0] == before[0][0]
    assert digests([[parameter]])[0][1] == row_digest(staging.views(0, 0))
