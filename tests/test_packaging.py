import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"collectors", "eplb", "ipc", "loaders", "planners"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the tracked folders."""
    copy = tmp_path_factory.mktemp("source") / "flash-eplb"
    copy.mkdir()
    for name in FOLDERS | {"tests"}:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "py.typed", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(copy / "dist"), str(copy)], check=True)
    (made,) = (copy / "dist").glob("flash_eplb-*.whl")
    return zipfile.ZipFile(made)


def test_the_wheel_installs_nothing_outside_the_package(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"flash_eplb"}
    assert not any("/tests/" in name for name in wheel.namelist())


def test_the_wheel_holds_every_module(wheel):
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            assert f"flash_eplb/{file.relative_to(ROOT)}" in wheel.namelist()
    assert "flash_eplb/py.typed" in wheel.namelist()


def test_the_wheel_has_the_command_and_the_plug_in(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    text = wheel.read(name).decode()
    assert "eplb = flash_eplb.eplb.__main__:main" in text
    assert "[vllm.general_plugins]" in text
    assert "flash_eplb = flash_eplb.eplb.plugin:register" in text
