"""Processes with a copy of the package that can, like the home, not be written, even by root: files
stand where numba's folders would be."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import flash_eplb
from flash_eplb import kernel_cache

COMPILE = """
import numpy as np
from flash_eplb.planners.par import par
print(par(np.ones((1, 1, 2)), np.array([[[0], [1]]]))[0])
"""


@pytest.fixture
def copied(tmp_path):
    """`copied(*command, **variables)` runs Python with the copy; a failure does not raise."""
    root = Path(flash_eplb.__file__).parent
    copy = tmp_path / "flash_eplb"
    copy.mkdir()
    for name in ("eplb", "collectors", "ipc", "loaders", "planners"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root / name, copy / name, ignore=ignored)
        (copy / name / "__pycache__").write_text("")
    for path in root.glob("*.py"):
        shutil.copy(path, copy)

    def run(*command, **variables):
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("NUMBA_", "XDG_"))}
        here = {"PYTHONPATH": str(tmp_path), "HOME": "/dev/null", "TMPDIR": str(tmp_path)}
        return subprocess.run(
            [sys.executable, *command],
            env=kept | here | variables,
            capture_output=True,
            text=True,
            timeout=250,
        )

    return run


def folder_of(tmp_path):
    return tmp_path / f"flash_eplb-kernels-{os.geteuid()}"


def test_kernels_are_kept_in_a_folder_of_the_user_s_where_numba_has_none(copied, tmp_path):
    found = copied("-c", COMPILE)
    assert (found.returncode, found.stdout, found.stderr) == (0, "1.0\n", "")
    folder = folder_of(tmp_path)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(folder.glob("planners_*/par.*.nbc"))


def test_it_is_said_where_there_is_a_log(copied, tmp_path):
    code = "from flash_eplb.kernel_cache import notice; print(notice())"
    said = (
        "numba can keep compiled kernels neither in the package nor in /dev/null/.cache/numba: "
        f"they are in {folder_of(tmp_path)}; set NUMBA_CACHE_DIR to have them elsewhere\n"
    )
    assert copied("-c", code).stdout == said
    code = "from flash_eplb.eplb.plugin import register; register()"
    found = copied("-c", code, EPLB_ENABLED="1")
    assert said in found.stderr


def test_numba_keeps_its_own_places(copied, tmp_path):
    code = "from flash_eplb.kernel_cache import notice; print([notice()])"
    home = tmp_path / "home"
    assert copied("-c", code, HOME=str(home)).stdout == "['']\n"
    assert copied("-c", code, NUMBA_CACHE_DIR=str(home)).stdout == "['']\n"
    assert not folder_of(tmp_path).exists()


@pytest.mark.parametrize("kind", ["open", "link"])
def test_a_folder_that_others_may_have_filled_is_not_used(copied, tmp_path, kind):
    folder = folder_of(tmp_path)
    if kind == "open":
        folder.mkdir()
        folder.chmod(0o770)
    else:
        (tmp_path / "elsewhere").mkdir(0o700)
        folder.symlink_to("elsewhere")
    found = copied("-m", "flash_eplb.eplb.cli", "warmup")
    assert (found.returncode, found.stderr) == (
        1,
        "eplb: numba finds no place for compiled kernels; set NUMBA_CACHE_DIR to a folder that "
        "can be written\n",
    )
    assert list(folder.iterdir()) == []


def test_a_numba_that_is_there_already_is_told(copied, tmp_path):
    found = copied("-c", "import numba\n" + COMPILE)
    assert (found.returncode, found.stderr) == (0, "")
    assert list(folder_of(tmp_path).glob("planners_*/par.*.nbc"))


def test_kernels_from_before_a_change_of_any_source_with_kernels_are_forgotten(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(kernel_cache, "__file__", str(tmp_path / "kernel_cache.py"))
    sources = [tmp_path / name for name in ("planners/search.py", "ipc/ring.py", "ipc/plain.py")]
    for source in sources:
        source.parent.mkdir(exist_ok=True)
        source.write_text("" if source.stem == "plain" else "from numba import njit")
    index = tmp_path / "planners" / "__pycache__" / "search.kernel.nbi"

    def is_kept():
        index.parent.mkdir(exist_ok=True)
        index.write_text("compiled")
        kernel_cache._forget_old_kernels()
        return index.exists()

    is_kept()
    assert is_kept()
    sources[2].write_text("nothing that numba compiles")
    assert is_kept()
    sources[1].write_text("from numba import njit  # changed")
    assert not is_kept()
    assert is_kept()
    assert {path.name for path in index.parent.iterdir()} == {index.name, "kernels.sha256"}
