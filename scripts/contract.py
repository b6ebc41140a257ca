"""`make contract`: record what we touch of vLLM in each version that we support.

Downloads each version's wheel (300 MB, removed after reading), reads its sources without importing
them, and writes tests/contract/vllm-VERSION.json, one line per name.
"""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

from flash_eplb.eplb.probe import Facts, find_facts

ROOT = Path(__file__).resolve().parents[1]
DOWNLOADS = ROOT / "build" / "contract"
RECORDED = ROOT / "tests" / "contract"
VERSIONS = ("0.30.0", "0.31.0", "0.32.0", "0.33.0")
SYSTEM = ["--python-version", "3.12", "--platform", "manylinux_2_28_x86_64"]


def main() -> None:
    """Record the versions that are named, or all."""
    for version in sys.argv[1:] or VERSIONS:
        wheel = _download(version)
        try:
            facts = find_facts(lambda module, wheel=wheel: _text(wheel, module))
        finally:
            wheel.unlink()
        path = RECORDED / f"vllm-{version}.json"
        path.write_text(as_json(facts))
        print(f"{path.relative_to(ROOT)}: {sum(map(len, facts.values()))} names")


def as_json(facts: Facts) -> str:
    """One line per name."""
    modules = []
    for module, names in facts.items():
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(names[name])}" for name in names)
        modules.append(f" {json.dumps(module)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(modules) + "\n}\n"


def _download(version: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "-qq"]
    command += ["--no-deps", "--only-binary", ":all:", *SYSTEM, "-d", str(DOWNLOADS)]
    subprocess.run([*command, f"vllm=={version}"], check=True)
    (wheel,) = DOWNLOADS.glob(f"vllm-{version}-*.whl")
    return wheel


def _text(wheel: Path, module: str) -> str | None:
    name = module.replace(".", "/") + ".py"
    with zipfile.ZipFile(wheel) as file:
        return file.read(name).decode() if name in file.namelist() else None


if __name__ == "__main__":
    main()
