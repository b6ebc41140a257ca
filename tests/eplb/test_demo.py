import os
import re
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from typer.testing import CliRunner

from flash_eplb.eplb import cli
from flash_eplb.eplb.cli import app
from flash_eplb.eplb.demo import checkpoint
from flash_eplb.eplb.demo import run as demo
from flash_eplb.eplb.demo.checkpoint import TinyMoE, write_checkpoint
from flash_eplb.eplb.demo.traffic import complete


def test_the_demo_s_planner_records_where_it_is_told(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(demo.subprocess, "Popen", lambda *_, **options: started.append(options))
    for record in ("", "some/where"):
        demo._start_planner(tmp_path / "planner.log", record)
    assert [options["env"]["EPLB_RECORD"] for options in started] == ["", "some/where"]


def test_two_demos_have_two_sessions():
    assert demo.SETTINGS["session"].endswith(f"-{os.getpid()}")


def test_without_a_vllm_the_command_says_what_sets_it_up(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(demo, "run", lambda *_: 1 / 0)
    found = CliRunner().invoke(app, ["demo"])
    assert (found.exit_code, found.stderr) == (
        2,
        "eplb: the demo runs a real vLLM on the CPU, and vllm and transformers cannot be imported "
        "here; `make demo` in a clone sets up what it needs\n",
    )


def test_the_command_passes_the_folder_on(monkeypatch):
    asked = []
    monkeypatch.setattr("flash_eplb.eplb.cli._OF_DEMO", ())
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


class Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"choices": [{"index": 0, "token_ids": [7, 8]}]}')

    do_GET = do_POST

    def log_message(self, *_):
        pass


def test_a_proxy_of_the_environment_is_not_asked_for_what_is_here(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert complete(url, "model", [[1]], 2) == [[7, 8]]
        server.shutdown()


def test_a_checkpoint_that_was_not_written_to_its_end_is_written_anew(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    folder = tmp_path / "demo" / "tiny-moe"
    sizes = TinyMoE(layers=1, experts=4, hidden=8, expert_width=8, vocabulary=16)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_tokenizer", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_checkpoint(folder, sizes)
    written = write_checkpoint(folder, sizes)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(written))
    assert os.listdir(tmp_path / "demo") == ["tiny-moe"]
    before = os.stat(written / "config.json").st_mtime_ns
    assert write_checkpoint(folder, sizes) == folder
    assert os.stat(written / "config.json").st_mtime_ns == before


def test_ctrl_c_is_no_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo.signal, "signal", lambda *_: None)
    monkeypatch.setattr(demo, "write_checkpoint", lambda path: path)
    monkeypatch.setattr(cli, "compile_kernels", lambda: None)
    monkeypatch.setattr(demo, "TinyMoE", dict)
    monkeypatch.setattr(demo, "batches", lambda *_: [])
    monkeypatch.setattr(demo, "_reference", lambda *_: demo._interrupt(demo.Progress()))
    assert demo.run(str(tmp_path)) == 130
    assert "FAILED" not in capsys.readouterr().out


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_stands_in_the_checkpoint_s_place_is_left_alone(is_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(demo.signal, "signal", lambda *_: None)
    monkeypatch.setattr(cli, "_OF_DEMO", ())  # without a vLLM, too
    place = tmp_path / "tiny-moe"
    if is_folder:
        place.mkdir()
    (place / "mine" if is_folder else place).write_text("mine")
    found = CliRunner().invoke(app, ["demo", "--folder", str(tmp_path)])
    assert (found.exit_code, found.stderr) == (
        2,
        f"eplb: --folder {tmp_path}: {place} is there and is no checkpoint of the demo; give "
        "another folder\n",
    )


def test_a_disk_without_room_for_the_checkpoint_is_told(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors")

    def full(*_, **__):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(demo.signal, "signal", lambda *_: None)
    monkeypatch.setattr(cli, "_OF_DEMO", ())  # without a vLLM, too
    monkeypatch.setattr(transformers.Qwen3MoeForCausalLM, "save_pretrained", full)
    found = CliRunner().invoke(app, ["demo", "--folder", str(tmp_path)])
    assert (found.exit_code, found.stderr) == (
        2,
        f"eplb: --folder {tmp_path}: I/O error: No space left on device (os error 28); give "
        "another folder\n",
    )
    assert os.listdir(tmp_path) == []
