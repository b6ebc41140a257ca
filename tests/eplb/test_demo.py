import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flash_eplb.eplb.cli import app
from flash_eplb.eplb.demo import run as demo


def test_the_demo_s_planner_records_where_it_is_told(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(demo.subprocess, "Popen", lambda *_, **options: started.append(options))
    for record in ("", "some/where"):
        demo._start_planner(tmp_path / "planner.log", record)
    assert [options["env"]["EPLB_RECORD"] for options in started] == ["", "some/where"]


def test_two_demos_have_two_sessions():
    assert demo.SETTINGS["session"].endswith(f"-{os.getpid()}")


def test_the_command_passes_the_folder_on(monkeypatch):
    asked = []
    monkeypatch.setattr(demo, "run", lambda *arguments: asked.append(arguments) or 0)
    assert CliRunner().invoke(app, ["demo", "--record", "some/where"]).exit_code == 0
    assert asked == [("build/demo", "some/where")]


def test_the_table_in_the_readme_has_the_rows_of_the_demo_s():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    shown = re.findall(r"^\| (.*?) \|.*\|$", readme.split("| what | measured |")[1], re.M)
    table = demo._table(demo.Outcome(par=[1.2, 1.1]))
    rows = list(table.columns[0].cells)
    assert [row.replace("`", "") for row in shown[1 : 1 + len(rows)]] == rows


class Seen:
    """An observer that has seen no whole episode."""

    steps = 9

    def par(self, first, last):
        return float("nan")

    def commits(self):
        return 0

    def total(self, field):
        return 0


def test_what_is_said_names_the_folder_s_logs_and_no_nan(monkeypatch, tmp_path):
    def no_server(*_, **__):
        raise demo.ServerError("not here")

    said = []
    monkeypatch.setattr(demo, "VllmServer", no_server)
    monkeypatch.setattr(demo, "complete", lambda *_: [])
    progress = demo.Progress()
    monkeypatch.setattr(progress, "say", said.append)
    with pytest.raises(demo.ServerError):
        demo._reference(tmp_path / "tiny-moe", [], tmp_path, progress)
    server = type("Server", (), {"url": "", "model": ""})
    demo._one_pass(server, [[]], Seen(), progress, 0)
    assert said == [
        f"starting vLLM without flash_eplb (log: {tmp_path / 'without.log'})",
        "pass 1/4, topic 0: 9 steps, PAR -, 0 rounds committed, 0 slots moved",
    ]
