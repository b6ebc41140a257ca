"""Fetch the source distribution of a version of vllm-ascend with pip and unpack its Python files.

    python scripts/ascend_source.py 0.23.0 build/peers

prints the folder that holds the package `vllm_ascend`. What is there already is not fetched again.
The distribution is source alone; nothing is built, and nothing of it enters this repository.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

# what the source distribution's setup.py imports before pip can read its metadata
BUILD_TOOLS = ("setuptools_scm==10.3.4", "vcs_versioning==2.6.0")
SETTINGS = {"COMPILE_CUSTOM_KERNELS": "0", "SOC_VERSION": "ascend910b1"}


def main(version: str, folder: str) -> int:
    """Print where the sources of `version` are under `folder`; returns the exit code."""
    name = f"vllm_ascend-{version}"
    target = Path(folder).resolve()
    root, done = target / name, target / name / ".unpacked"
    if not done.is_file():
        target.mkdir(parents=True, exist_ok=True)
        archive = target / f"{name}.tar.gz"
        if not archive.is_file() and (trouble := fetch(version, target)):
            print(f"vllm-ascend {version} cannot be fetched: {trouble}", file=sys.stderr)
            return 1
        shutil.rmtree(root, ignore_errors=True)
        with tarfile.open(archive) as tar:
            wanted = (m for m in tar if m.name.startswith(f"{name}/vllm_ascend/"))
            tar.extractall(target, (m for m in wanted if m.name.endswith(".py")), filter="data")
        done.touch()
    print(root)
    return 0


def fetch(version: str, target: Path) -> str:
    """Download the archive; the end of what pip says if it cannot, else ""."""
    tools = target / "tools"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    source = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", str(target)]
    return run([*pip, "install", "--no-deps", "--target", str(tools), *BUILD_TOOLS], {}) or run(
        [*pip, "download", *source, f"vllm-ascend=={version}"],
        {**SETTINGS, "PYTHONPATH": str(tools)},
    )


def run(command: list[str], settings: dict[str, str]) -> str:
    """Run `command`; the last lines of what it says if it fails, else ""."""
    done = subprocess.run(
        command, env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    return "\n".join(done.stderr.strip().splitlines()[-8:]) if done.returncode else ""


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
