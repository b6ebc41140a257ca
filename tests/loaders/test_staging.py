import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from flash_eplb.loaders import digest as digest_module
from flash_eplb.loaders.copies import Copies
from flash_eplb.loaders.digest import device_digest, digests, row_digest
from flash_eplb.loaders.reorder import reorder_slots
from flash_eplb.loaders.staging import (
    Staging,
    dense,
    row_bytes,
    slot_forms,
    slot_views,
)

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


def commit(staging, weights, row, layer, slot):
    """What a loader does with a row that has arrived."""
    Copies(slot_views(weights[layer], slot), staging.views(row, layer)).run()


@given(st.lists(TENSORS, min_size=1, max_size=3), st.integers(1, 4), st.booleans(), st.data())
def test_a_commit_copies_exactly_one_slot(kinds, rows, borrows, data):
    weights = layers_of(*kinds)
    buffer = [torch.empty_like(tensor)[:2] for tensor in weights[0]] if borrows else []
    staging = Staging(weights, rows, buffer)
    if not borrows:
        assert rows * max(row_bytes(weights)) <= staging.nbytes
        assert staging.nbytes <= rows * (max(row_bytes(weights)) + 15 * 3)
    layer = data.draw(st.integers(0, len(weights) - 1))
    slot = data.draw(st.integers(0, SLOTS - 1))
    row = data.draw(st.integers(0, rows - 1))
    staged = [fill(staging.views(number, layer), 50 * number) for number in range(rows)]
    expected = snapshot(weights)
    for place, content in enumerate(staged[row]):
        expected[layer][place][slot] = content
    commit(staging, weights, row, layer, slot)
    assert snapshot(weights) == expected
    # the rows still hold what they held, and share nothing with the weights
    for number in range(rows):
        assert [view.tolist() for view in staging.views(number, layer)] == staged[number]
    fill(staging.views(row, layer), 99)
    assert snapshot(weights) == expected


def test_the_engines_buffer_gives_the_first_rows():
    layers = [[torch.zeros(3, 4), torch.zeros(3, 5, dtype=torch.int8)] for _ in range(2)]
    buffer = [torch.zeros(2, 4), torch.zeros(2, 5, dtype=torch.int8)]
    staging = Staging(layers, 3, buffer)
    assert staging.borrowed == 2
    assert staging.nbytes == 32  # one row of 16 + 5 bytes, each part at a multiple of 16
    for row, part in ((0, 0), (1, 0), (0, 1)):
        assert staging.views(row, 1)[part].data_ptr() == buffer[part][row].data_ptr()
    assert Staging(layers, 2, buffer).nbytes == 0
    assert Staging(layers, 1, buffer).borrowed == 1


def test_rows_that_do_not_fit_into_memory_name_the_setting_and_the_remedy():
    """vLLM has given the rest of a GPU to its cache by then."""
    text = (
        r"^4611686018427387 staging rows of 0\.0 MiB do not fit into the memory of cpu; lower "
        r"EPLB_STAGING_ROWS, or leave more of it free \(on a GPU: --gpu-memory-utilization\): \S"
    )
    with pytest.raises(MemoryError, match=text):
        Staging([[torch.zeros(3, 5)]], 2**62 // 1000)


def test_a_buffer_into_which_not_every_layer_fits_is_left_alone():
    layers = [[torch.zeros(3, 4)], [torch.zeros(3, 4), torch.zeros(3, 1)]]
    assert Staging(layers, 3, [torch.zeros(2, 4)]).borrowed == 0
    assert Staging([[torch.zeros(3, 5)]], 3, [torch.zeros(2, 4)]).borrowed == 0
    assert Staging([[torch.zeros(3, 3)]], 3, [torch.zeros(2, 4)]).borrowed == 2


def of_experts(layer, digest):
    return [digest(slot_views(layer, slot)) for slot in range(SLOTS)]


@pytest.mark.parametrize("digest", [row_digest, device_digest])
@given(kinds=TENSORS, data=st.data())
def test_any_flipped_bit_changes_the_digest(digest, kinds, data):
    (layer,) = layers_of(kinds)
    before = of_experts(layer, digest)
    views = slot_views(layer, 1)
    view = views[data.draw(st.integers(0, len(views) - 1))]
    place = data.draw(st.integers(0, view.numel() - 1))
    view[place] ^= 1 << data.draw(st.integers(0, 7))
    after = of_experts(layer, digest)
    assert after[1] != before[1]
    assert (after[0], after[2]) == (before[0], before[2])
    assert all(0 <= number < 2**63 for number in after)


@given(st.integers(0, 2**32 - 1), st.integers(0, 4999), st.integers(0, 4999))
def test_words_that_change_places_change_the_digest_of_a_device(seed, first, second):
    words = torch.randint(0, 100, (5000,), generator=torch.Generator().manual_seed(seed))
    words = words.to(torch.int32)
    other = words.clone()
    other[first], other[second] = words[second].clone(), words[first].clone()
    found = [device_digest([part.view(torch.uint8)]) for part in (words, other)]
    assert (found[0] == found[1]) == torch.equal(words, other)


def rows_change_places(words, random):
    place, width = int(random.integers(0, 4000)), int(random.integers(1, 5))
    two = words[place : place + 2 * width].reshape(2, width)
    words[place : place + 2 * width] = two.flip(0).ravel()


def bits_flip_at_even_distances(words, random):
    place, step = int(random.integers(0, 3000)), int(random.integers(1, 300))
    words[place : place + 4 * step : step] ^= 1 << int(random.integers(0, 31))


def second_differences_are_added(words, random):
    place = int(random.integers(0, 4000))
    words[place : place + 3] += torch.tensor([1, -2, 1], dtype=torch.int32)


@pytest.mark.parametrize(
    "change", [rows_change_places, bits_flip_at_even_distances, second_differences_are_added]
)
def test_changes_of_several_words_do_not_cancel_in_the_digest_of_a_device(change):
    """Rows of few values, as scales are, in regular places: what a sum by the places would miss."""
    random = np.random.default_rng(0)
    before = torch.from_numpy(random.integers(0, 2, 5000, dtype=np.int32)) * 0x3F80
    digest = device_digest([before.view(torch.uint8)])
    for _ in range(300):
        words = before.clone()
        change(words, random)
        found = device_digest([words.view(torch.uint8)])
        assert (found == digest) == torch.equal(words, before)


def test_a_device_digest_of_several_chunks_sees_each(monkeypatch):
    monkeypatch.setattr(digest_module, "_CHUNK", 8)
    monkeypatch.setattr(digest_module, "_weights", {})
    view = torch.arange(100, dtype=torch.uint8)
    seen = {device_digest([view])}
    for place in range(100):
        view[place] ^= 128
        seen.add(device_digest([view]))
        view[place] ^= 128
    assert len(seen) == 101
    swapped = torch.cat([view[32:64], view[:32], view[64:]])
    assert device_digest([swapped]) not in seen
    assert device_digest([view, torch.zeros(4, dtype=torch.uint8)]) != device_digest([view])


def test_equal_bytes_have_equal_digests_wherever_they_lie():
    weights = layers_of([(torch.bfloat16, (4, 3)), (torch.float32, (2,))])
    staging = Staging(weights, 2)
    for staged, live in zip(staging.views(1, 0), slot_views(weights[0], 2), strict=True):
        staged.copy_(live)
    assert row_digest(staging.views(1, 0)) == row_digest(slot_views(weights[0], 2))
    assert row_digest(staging.views(1, 0)) == digests(weights)[0][2]
    commit(staging, weights, 1, 0, 0)
    assert digests(weights)[0][0] == digests(weights)[0][2]


def test_a_digest_is_that_of_the_bytes_in_order():
    views = [torch.tensor(list(part), dtype=torch.uint8) for part in (b"1234", b"", b"56789")]
    assert row_digest(views) == xxhash.xxh3_64_intdigest(b"123456789") >> 1


def test_an_expert_tensor_without_contiguous_rows_is_refused():
    weights = torch.arange(24.0).view(2, 3, 4).transpose(1, 2)
    with pytest.raises(ValueError, match=r"an expert tensor of shape \(4, 3\) is not contig"):
        slot_views([weights], 0)
    with pytest.raises(ValueError, match="is not contiguous"):
        digests([[weights]])


def test_contiguous_rows_of_a_tensor_with_gaps_will_do():
    wide = torch.arange(24.0).view(4, 6)
    layer = [wide[::2]]
    staging = Staging([layer], 1)
    staging.views(0, 0)[0].copy_(torch.zeros(24, dtype=torch.uint8))
    commit(staging, [layer], 0, 0, 1)
    assert wide[:, 0].tolist() == [0, 6, 0, 18]


def test_parameters_are_weights_too():
    parameter = torch.nn.Parameter(torch.ones(2, 3), requires_grad=False)
    before = digests([[parameter]])
    staging = Staging([[parameter]], 1)
    fill(staging.views(0, 0), 1)
    commit(staging, [[parameter]], 0, 0, 1)
    assert digests([[parameter]])[0][0] == before[0][0]
    assert digests([[parameter]])[0][1] == row_digest(staging.views(0, 0))


@given(st.permutations(list(range(6))), st.permutations(list(range(6))))
def test_experts_change_slots_in_place(before, after):
    before, after = np.array(before), np.array(after)
    ids = torch.from_numpy(before.astype(np.float32))
    layer = [ids[:, None].repeat(1, 3), ids.to(torch.bfloat16)]
    reorder_slots(layer, before, after, Staging([layer], 1).views(0, 0))
    for tensor in layer:
        assert (tensor.float().view(6, -1) == torch.from_numpy(after)[:, None]).all()


def test_rows_that_are_made_in_inference_mode_are_written_outside_it():
    with torch.inference_mode():
        staging = Staging([[torch.zeros(2, 3)]], 1)
    staging.views(0, 0)[0].copy_(torch.ones(12, dtype=torch.uint8))


def listed(shapes, slots=3, layers=2, seed=0):
    """Layers whose tensors are one per slot, of the (dtype, shape)s given."""
    rng = torch.Generator().manual_seed(seed)
    return [
        [
            [torch.randint(-9, 9, shape, generator=rng).to(kind) for _ in range(slots)]
            for kind, shape in shapes
        ]
        for _ in range(layers)
    ]


FORMS = [(torch.int8, (4, 6)), (torch.float32, (4,)), (torch.bfloat16, (6, 4)), (torch.int32, ())]


def test_tensors_of_their_own_travel_as_they_are():
    weights = listed(FORMS)
    views = slot_views(weights[1], 2)
    assert [view.data_ptr() for view in views] == [stack[2].data_ptr() for stack in weights[1]]
    staging = Staging(weights, 2)
    for staged, view in zip(staging.views(1, 1), views, strict=True):
        assert (staged.shape, staged.dtype) == (view.shape, view.dtype)
        staged.copy_(view)
    assert row_digest(staging.views(1, 1)) == row_digest(views)
    assert row_bytes(weights) == (24 + 16 + 48 + 4,) * 2
    assert staging.nbytes == 2 * row_bytes(weights)[0]  # layers of one form share rows
    other = [row_digest(slot_views(weights[0], slot)) for slot in range(3)]
    assert row_digest(views) not in other


def test_the_dimensions_of_a_dense_tensor_travel_in_the_order_of_memory():
    weights = [[[torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1)]]]
    (view,) = slot_views(weights[0], 0)
    assert view.is_contiguous()
    assert view.data_ptr() == weights[0][0][0].data_ptr()
    assert view.flatten().tolist() == list(range(24))
    with pytest.raises(ValueError, match=r"shape \(3, 2\) and stride \(4, 2\) has gaps"):
        slot_views([[torch.arange(12.0).view(3, 4)[:, ::2]]], 0)


def test_the_stride_of_a_dimension_of_one_element_orders_nothing():
    """Slots that differ in nothing else are alike, so a row of one takes the expert of another."""
    memory = torch.arange(8.0)
    slots = [memory.as_strided((2, 1, 4), (1, stride, 2)) for stride in (1, 2, 100)]
    assert len(set(slot_forms(slots))) == 1
    assert {tuple(dense(slot).shape) for slot in slots} == {(4, 2, 1)}


def test_an_engines_buffer_of_tensors_serves_as_rows_if_all_layers_are_alike():
    weights, (buffer,) = listed(FORMS), listed(FORMS, slots=2, layers=1, seed=1)
    staging = Staging(weights, 3, buffer)
    assert staging.borrowed == 2
    assert staging.views(1, 0)[0].data_ptr() == buffer[0][1].data_ptr()
    assert staging.nbytes == row_bytes(weights)[0]
    mixed = [*weights, *listed(FORMS[:2], layers=1)]
    assert Staging(mixed, 3, buffer).borrowed == 0
    assert Staging(weights, 3, [torch.zeros(2, 92, dtype=torch.uint8)]).borrowed == 0
    own = Staging(mixed, 1)
    assert [view.dtype for view in own.views(0, 2)] == [torch.int8, torch.float32]


def test_slots_of_tensors_of_their_own_change_places():
    weights = listed(FORMS, layers=1)[0]
    before = [row_digest(slot_views(weights, slot)) for slot in range(3)]
    reorder_slots(
        weights, np.array([5, 6, 7]), np.array([7, 5, 6]), Staging([weights], 1).views(0, 0)
    )
    after = [row_digest(slot_views(weights, slot)) for slot in range(3)]
    assert after == [before[2], before[0], before[1]]


def test_slots_made_in_inference_mode_change_places_outside_it():
    with torch.inference_mode():
        weights = listed(FORMS, layers=1)[0]
    before = [row_digest(slot_views(weights, slot)) for slot in range(3)]
    reorder_slots(
        weights, np.array([5, 6, 7]), np.array([6, 5, 7]), Staging([weights], 1).views(0, 0)
    )
    after = [row_digest(slot_views(weights, slot)) for slot in range(3)]
    assert after == [before[1], before[0], before[2]]
