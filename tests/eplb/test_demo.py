from typer.testing import CliRunner

from flash_eplb.eplb.cli import app
from flash_eplb.eplb.demo import run as demo


def test_the_demo_s_planner_records_where_it_is_told(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(demo.subprocess, "Popen", lambda *_, **options: started.append(options))
    for record in ("", "some/where"):
        demo._start_planner(tmp_path / "planner.log", record)
    assert [options["env"]["EPLB_RECORD"] for options in started] == ["", "some/where"]


def test_the_command_passes_the_folder_on(monkeypatch):
    asked = []
    monkeypatch.setattr(demo, "run", lambda *arguments: asked.append(arguments) or 0)
    assert CliRunner().invoke(app, ["demo", "--record", "some/where"]).exit_code == 0
    assert asked == [("build/demo", "some/where")]
