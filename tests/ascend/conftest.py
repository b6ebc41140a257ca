import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
_found: dict[str, str] = {}


@pytest.fixture(scope="session")
def source():
    """`source(version)` is the folder of vllm-ascend's sources, fetched by pip if need be.

    Where it cannot be fetched the test is skipped by name; in CI it fails.
    """

    def get(version):
        if version not in _found:
            done = subprocess.run(
                [sys.executable, ROOT / "scripts" / "ascend_source.py", version, "build/peers"],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
                timeout=280,
            )
            if done.returncode:
                trouble = f"not run: {done.stderr.strip()[-1000:]}"
                if os.environ.get("CI"):
                    pytest.fail(trouble)
                pytest.skip(trouble)
            _found[version] = done.stdout.strip()
        return _found[version]

    return get


@pytest.fixture
def run_ranks(session, tmp_path):
    """`run_ranks(script, root, version, ranks, *cases)` runs a rank script on all ranks."""

    def run(script, root, version, ranks, *cases):
        environment = {
            **{name: value for name, value in os.environ.items() if "EPLB" not in name},
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_PLUGINS": "",
            "PYTHONPATH": str(HERE),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        shared = (tmp_path / "store", f"{session}.", tmp_path)
        started = []
        for rank in range(ranks):
            command = [sys.executable, HERE / script, root, version, rank, ranks]
            command += [shared[0], session, shared[2], *cases]
            with (tmp_path / f"rank{rank}.log").open("w") as log:
                started.append(
                    subprocess.Popen(
                        list(map(str, command)),
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        try:
            codes = [process.wait(timeout=240) for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()
        logs = [(tmp_path / f"rank{rank}.log").read_text() for rank in range(ranks)]
        failed = [rank for rank, code in enumerate(codes) if code]
        assert not failed, logs[failed[0]][-6000:]
        return logs

    return run
