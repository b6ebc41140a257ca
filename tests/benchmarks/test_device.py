"""`make bench-device` where there is no GPU: it says so, and its code runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "collectors"))
from fake_device import FakeDevice

from benchmarks import device as bench
from benchmarks import device_cells as cells

ROOT = Path(__file__).parents[2]


def run(*options):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.device", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_ends_with_2():
    done = run()
    assert done.returncode == 2
    assert done.stderr == "bench-device: there is no CUDA device here, so nothing was run\n"
    assert done.stdout == ""


def test_every_part_runs_and_is_right():
    done = run("--on-cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout)
    assert figures["collector"]["right"]
    assert figures["collector"]["p50_us"] > 0
    assert figures["staging"]["inflation"] > 0
    assert figures["staging"]["staged_gb_s"] > 0
    assert figures["commit"]["gb_s"] > 0
    assert figures["digest"]["ratio"] > 0
    assert figures["graph"]["right"]
    # memory of the CPU has no CUDA handle: all of it but the handles is run, by way of gloo
    assert figures["ipc"]["transport"] == "gloo"
    assert figures["ipc"]["right"]
    names = {target.name: target.met for target in bench.targets(figures)}
    assert len(names) == 10
    assert not names["CUDA IPC between two processes: every byte"]
    assert names["CUDA graph: routes by a commit's tables"]


class LateDevice(FakeDevice):
    """Copies land some calls later."""

    def event(self):
        if len(self.stream) > 6:
            self.run(events=2)
        return super().event()


def test_the_collector_s_calls_are_seen_to_return_before_a_late_device(monkeypatch):
    late = LateDevice()
    monkeypatch.setattr(cells, "_finish", lambda device: late.run(events=10**6))
    found = cells.collector(bench.TINY, torch.device("cpu"), late)
    assert found["right"]
    assert found["ahead"] > 0.9


def test_a_collector_that_loses_tokens_is_not_right(monkeypatch):
    late = LateDevice()
    monkeypatch.setattr(late, "copy", lambda target, source: target.zero_())
    monkeypatch.setattr(cells, "_finish", lambda device: late.run(events=10**6))
    assert not cells.collector(bench.TINY, torch.device("cpu"), late)["right"]


def test_a_graph_that_does_not_see_the_tables_is_not_right(monkeypatch):
    first = []

    def frozen(action, device):
        def replay():
            if not first:
                first.append(action())

        return replay

    monkeypatch.setattr(cells, "_captured", frozen)
    assert not cells.graph(torch.device("cpu"))["right"]
