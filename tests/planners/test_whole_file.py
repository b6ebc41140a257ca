import os
import pty
import stat

import numpy as np
import pytest

from flash_eplb.planners.expert_map import SavedPlacement, read_map
from flash_eplb.planners.whole_file import is_special, try_whole, write_whole


@pytest.fixture
def fifo(tmp_path):
    """(path, descriptor of both ends) of a named pipe."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    ends = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    yield path, ends
    os.close(ends)


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "x.json"
    for text in ("a longer text", "ä"):
        write_whole(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_pipe_stays_and_gets_the_text(fifo, tmp_path):
    path, ends = fifo
    write_whole(path, "text")
    assert os.read(ends, 99) == b"text"
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_device_behind_a_link_stays_and_gets_the_text(tmp_path):
    reader, writer = pty.openpty()
    link = tmp_path / "link"
    link.symlink_to(os.ttyname(writer))
    write_whole(link, "text")
    assert os.read(reader, 99) == b"text"
    assert link.is_symlink()
    assert is_special(link)
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("is_there", [True, False])
def test_what_a_link_leads_to_is_replaced_and_the_link_stays(tmp_path, is_there):
    folder, link = tmp_path / "elsewhere", tmp_path / "link.json"
    folder.mkdir()
    if is_there:
        (folder / "x.json").write_text("before")
    link.symlink_to("elsewhere/x.json")
    write_whole(link, "text")
    assert link.is_symlink()
    assert (folder / "x.json").read_text() == "text"
    assert os.listdir(folder) == ["x.json"]


@pytest.mark.parametrize("write", [try_whole, lambda path: write_whole(path, "text")])
@pytest.mark.parametrize("name", ["absent/x", "x" * 255])
def test_what_cannot_be_written_leaves_nothing(tmp_path, name, write):
    with pytest.raises(OSError):
        write(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_a_try_leaves_what_is_there(tmp_path):
    path = tmp_path / "x"
    try_whole(path)
    assert os.listdir(tmp_path) == []
    path.write_text("before")
    try_whole(path)
    assert path.read_text() == "before"


def test_a_placement_is_saved_behind_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "map.json"
    link.symlink_to("elsewhere/map.json")
    SavedPlacement(str(link)).save(np.array([[[0, 1], [1, 0]]]))
    assert link.is_symlink()
    assert read_map(tmp_path / "elsewhere" / "map.json").shape == (1, 2, 2, 2)
