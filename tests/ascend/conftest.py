import contextlib
import os
import signal
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
    """`run_ranks(script, root, version, ranks, *cases)` gives the log of each rank of a script."""

    def run(script, root, version, ranks, *cases):
        environment = {
            **{name: value for name, value in os.environ.items() if "EPLB" not in name},
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_PLUGINS": "",
            "PYTHONPATH": str(HERE),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        command = [sys.executable, HERE / script, root, version, ranks, session, tmp_path, *cases]
        process = subprocess.Popen(
            list(map(str, command)),
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            _, said = process.communicate(timeout=240)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        logs = [path.read_text() for path in sorted(tmp_path.glob("rank*.log"))]
        trouble = [log[-3000:] for log in logs if not log.rstrip().endswith("}")]
        assert not process.returncode, "\n".join([said[-3000:], *trouble])
        assert len(logs) == ranks
        return logs

    return run
