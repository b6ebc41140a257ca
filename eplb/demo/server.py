"""A real `vllm serve` on the CPU with expert parallelism, as a context manager."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

RANKS = 2
REDUNDANT = 4
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "tensor_parallel_size": RANKS,
    "enable_expert_parallel": True,
    "enable_eplb": True,
    "eplb_config": {
        "num_redundant_experts": REDUNDANT,
        "step_interval": 10**9,  # the baseline keeps its placement
        "use_async": False,
        "communicator": "torch_nccl",  # over gloo here; upstream's default wants an accelerator
    },
    "max_model_len": 256,
    "max_num_seqs": 16,
    "enable_prefix_caching": False,
}
"""Engine arguments of the demo and the tests, in the names of `vllm.LLM`."""


open_local = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
"""`urllib.request.urlopen` for servers of this host, which the environment's proxy knows not."""


def environment(**settings: object) -> dict[str, str]:
    """The environment for vLLM's CPU build with our patches, and `EPLB_<NAME>` of `settings`."""
    cores = sorted(os.sched_getaffinity(0))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("EPLB_")}
    return {
        **inherited,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(cores[n % len(cores)]) for n in range(RANKS)),
        "VLLM_NO_USAGE_STATS": "1",
        "TORCHDYNAMO_DISABLE": "1",  # no C++ compiler needed, and a start that is seconds shorter
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "EPLB_CPU_PATCHES": "1",
        **{f"EPLB_{name.upper()}": str(value) for name, value in settings.items()},
    }


def _arguments() -> list[str]:
    words = []
    for name, value in ENGINE.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        elif isinstance(value, dict):
            words += [option, json.dumps(value)]
        else:
            words += [option, str(value)]
    return words


class ServerError(RuntimeError):
    """`vllm serve` ended or did not come up; the text carries the end of its log."""


class VllmServer:
    """Starts `vllm serve` in a process group of its own, and ends exactly that group.

    Args:
        checkpoint: folder of the model.
        log: file for its output.
        settings: `EPLB_*` settings by their lower-case names.
        waiting: called every half second while it starts, with the seconds gone.
        arguments: more words for `vllm serve`.
    """

    def __init__(
        self,
        checkpoint: Path,
        log: Path,
        waiting: Callable[[float], None] = lambda seconds: None,
        arguments: tuple[str, ...] = (),
        **settings: Any,
    ):
        self.model = str(checkpoint)
        self.log = log
        self._waiting = waiting
        self._settings = settings
        self._arguments = arguments
        self._ready = False
        self.url = f"http://127.0.0.1:{_free_port()}"

    def __enter__(self) -> VllmServer:
        self._others = vllm_segments()
        command = [str(Path(sys.executable).parent / "vllm"), "serve", self.model]
        command += [*_arguments(), "--port", self.url.rpartition(":")[2], *self._arguments]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                env=environment(**self._settings),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_ready(timeout=300)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def text(self) -> str:
        """Everything that it has printed."""
        return self.log.read_text(errors="replace")

    def _wait_until_ready(self, timeout: float) -> None:
        begin = time.monotonic()
        while (gone := time.monotonic() - begin) < timeout:
            if self.process.poll() is not None:
                raise ServerError(f"vllm serve ended:\n{self.text()[-4000:]}")
            try:
                with open_local(f"{self.url}/health", timeout=2):
                    self._ready = True
                    return
            except (urllib.error.URLError, OSError):
                self._waiting(gone)
                time.sleep(0.5)
        raise ServerError(f"vllm serve was not ready in {timeout:.0f} s:\n{self.text()[-4000:]}")

    def stop(self) -> None:
        """SIGTERM, as a service manager would; a server that does not end is killed.

        While vLLM loads, it does not listen to SIGTERM. The trackers of Python's multiprocessing
        are spared: they end with the others, and remove what those had in /dev/shm.
        """
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        if not self._ends_within(30 if self._ready else 3):
            for pid in _group_members(self.process.pid):
                if b"resource_tracker" not in _command_line(pid):
                    _kill(pid)
            if not self._ends_within(10):
                for pid in _group_members(self.process.pid):
                    _kill(pid)
        self.process.wait()
        remove_vllm_segments(self._others)

    def _ends_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while _group_lives(self.process):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True


def vllm_segments() -> set[Path]:
    """What vLLM's workers keep in /dev/shm; vLLM kills them before they can remove it."""
    return set(Path("/dev/shm").glob("vllm_dist_*"))


def remove_vllm_segments(others: set[Path]) -> None:
    """Remove what has come since `others` and is in nobody's memory any more."""
    for path in vllm_segments() - others:
        if not _is_mapped(path):
            path.unlink(missing_ok=True)


def _is_mapped(path: Path) -> bool:
    """Whether a process that we may look at uses the segment."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if str(path).encode() in maps.read_bytes():
                return True
    return False


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # reap the leader
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _group_members(group: int) -> list[int]:
    members = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(ProcessLookupError):
            if entry.name.isdigit() and os.getpgid(int(entry.name)) == group:
                members.append(int(entry.name))
    return members


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
