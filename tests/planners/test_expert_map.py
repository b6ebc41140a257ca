import copy
import json

import numpy as np
import pytest

from flash_eplb.ipc.placement import PlacementError
from flash_eplb.planners.expert_map import MapError, encode_map, read_map

# As vLLM-Ascend's documents have it: MoE layers from 0, devices from 0, experts of each slot.
BY_HAND = """{
    "moe_layer_count": 2,
    "layer_list": [
        {
            "layer_id": 0,
            "device_count": 2,
            "device_list": [
                {"device_id": 0, "device_expert": [7, 2, 0, 3, 5]},
                {"device_id": 1, "device_expert": [6, 1, 4, 7, 2]}
            ]
        },
        {
            "layer_id": 1,
            "device_count": 2,
            "device_list": [
                {"device_id": 0, "device_expert": [0, 1, 2, 3, 4]},
                {"device_id": 1, "device_expert": [5, 6, 7, 0, 1]}
            ]
        }
    ]
}
"""
HELD = np.array([[[7, 2, 0, 3, 5], [6, 1, 4, 7, 2]], [[0, 1, 2, 3, 4], [5, 6, 7, 0, 1]]])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "map.json"


def refusal(path, content):
    """What is said of the content between the name of the file and the remedy."""
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(MapError) as error:
        read_map(path)
    # what is there is not written over: it may be the heat
    first, last = f"{path} is no expert map: ", "; write one with `eplb plan HEAT -o map.json`"
    text = str(error.value)
    assert text.startswith(first)
    assert text.endswith(last)
    return text[len(first) : -len(last)]


def changed(change):
    """The file by hand after `change`, which is given its layers."""
    file = copy.deepcopy(json.loads(BY_HAND))
    change(file["layer_list"])
    return file


def test_a_file_written_by_hand_is_read(path):
    path.write_text(BY_HAND)
    found = read_map(path)
    assert found.path == str(path)
    assert found.placement.dtype == np.int32
    assert (found.placement == HELD).all()
    assert found.shape == (2, 8, 2, 5)


def test_what_is_written_says_the_same_as_what_is_written_by_hand(path):
    text = encode_map(HELD)
    assert json.loads(text) == json.loads(BY_HAND)
    path.write_text(text)
    assert (read_map(str(path)).placement == HELD).all()


def test_what_was_written_is_read_again_whatever_its_shape(path):
    random = np.random.default_rng(5)
    for layers, experts, ranks, slots in [(1, 1, 1, 1), (3, 16, 4, 5), (58, 256, 32, 9)]:
        flat = np.arange(ranks * slots) % experts
        placement = random.permuted(np.tile(flat.reshape(ranks, slots), (layers, 1, 1)), axis=2)
        path.write_text(encode_map(placement))
        found = read_map(path)
        assert (found.placement == placement).all()
        assert found.shape == (layers, experts, ranks, slots)


def test_a_placement_that_is_not_valid_is_not_written():
    with pytest.raises(PlacementError, match="layer 0: expert 1 stands twice on rank 0"):
        encode_map(np.array([[[1, 1], [0, 1]]]))


def test_other_fields_do_not_matter(path):
    file = json.loads(BY_HAND)
    file["made_by"] = {"who": ["knows"]}
    path.write_text(json.dumps(file))
    assert (read_map(path).placement == HELD).all()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "Input data was truncated"),
        (b"\xff\xfe", "JSON is malformed: invalid character (byte 0)"),
        (b"[]", "Expected `object`, got `array`"),
        (b"{}", "Object missing required field `moe_layer_count`"),
        (b'{"x":' + b"[" * 10**6, "maximum recursion depth exceeded"),
        (
            b'{"moe_layer_count": 0, "layer_list": []}',
            "Expected `array` of length >= 1 - at `$.layer_list`",
        ),
    ],
)
def test_what_is_not_of_the_form_is_refused(path, content, said):
    assert refusal(path, content).startswith(said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda layers: layers.pop(),
            "moe_layer_count is 2, and layer_list has 1 layers",
        ),
        (
            lambda layers: layers[1].update(layer_id=2),
            "layer_list[1] has layer_id 2; MoE layers are numbered from 0, in their order",
        ),
        (
            lambda layers: layers.reverse(),
            "layer_list[0] has layer_id 1; MoE layers are numbered from 0, in their order",
        ),
        (
            lambda layers: layers[0].update(device_count=3),
            "layer 0 has device_count 3 and 2 devices; both must be 2, the devices of layer 0",
        ),
        (
            lambda layers: layers[1]["device_list"].pop(),
            "layer 1 has device_count 2 and 1 devices; both must be 2, the devices of layer 0",
        ),
        (
            lambda layers: layers[1]["device_list"].reverse(),
            "layer 1: device_list[0] has device_id 1; devices are numbered from 0, in their order",
        ),
        (
            lambda layers: layers[1]["device_list"][1]["device_expert"].pop(),
            "layer 1: device 1 has 4 experts, and device 0 of layer 0 has 5; all must have the "
            "same number",
        ),
        (
            lambda layers: layers[1]["device_list"][1].update(device_expert=[5, 6, 7, 0, 0]),
            "layer 1: expert 0 stands twice on rank 1",
        ),
        (
            lambda layers: layers[1]["device_list"][1].update(device_expert=[5, 6, 2, 0, 1]),
            "layer 1: expert 7 has no slot",
        ),
        (
            lambda layers: layers[0]["device_list"][1].update(device_expert=[6, -1, 4, 7, 2]),
            "Expected `int` >= 0 - at `$.layer_list[0].device_list[1].device_expert[1]`",
        ),
        (
            lambda layers: layers[0]["device_list"][1].update(device_expert=[6, 32767, 4, 7, 2]),
            "Expected `int` <= 32766 - at `$.layer_list[0].device_list[1].device_expert[1]`",
        ),
        (
            lambda layers: layers[0]["device_list"][1].update(device_expert=[]),
            "Expected `array` of length >= 1 - at `$.layer_list[0].device_list[1].device_expert`",
        ),
        (
            lambda layers: layers[0].update(device_list=[]),
            "Expected `array` of length >= 1 - at `$.layer_list[0].device_list`",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(path, change, said):
    assert refusal(path, changed(change)) == said


def test_a_file_that_is_not_there_and_a_folder_are_refused(path, tmp_path):
    with pytest.raises(MapError) as error:
        read_map(path)
    assert str(error.value) == (
        f"the expert map {path} cannot be read: No such file or directory; "
        f"write one with `eplb plan HEAT -o {path}`"
    )
    with pytest.raises(MapError, match="cannot be read: Is a directory"):
        read_map(tmp_path)
