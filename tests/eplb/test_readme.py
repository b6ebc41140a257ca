import re
import sys
from pathlib import Path

import numpy as np
import tomllib
from typer.main import get_command

from flash_eplb.eplb.cli import SETTINGS_OF, app
from flash_eplb.eplb.config import Config
from flash_eplb.planners.par import par
from flash_eplb.planners.policy import BUILT_IN, GROUP, choose_policy, make_policy

README = (Path(__file__).parents[2] / "README.md").read_text()


def table(heading):
    """The cells of each row of the first table under a heading."""
    rows = re.findall(r"^\|(.*)\|$", README.split(f"\n{heading}\n")[1].split("\n## ")[0], re.M)
    return [[cell.strip() for cell in row.split("|")] for row in rows[2:]]


def test_the_table_of_settings_is_the_code_s():
    for name, field in Config.model_fields.items():
        default = field.default
        if isinstance(default, bool):
            default = int(default)
        elif isinstance(default, float):
            default = f"{default:g}"
        assert f"| `EPLB_{name.upper()}` | {default} | {field.description} |" in README
    assert len(table("## Settings")) == len(Config.model_fields)


ORDER = list(Config.model_fields)


def named(text):
    """The settings that a sentence names, singly or from one to another."""
    found = set(ORDER[:4]) if "the first four" in text else set()
    for first, last in re.findall(r"`EPLB_(\w+)`(?:\sto\s`EPLB_(\w+)`)?", text):
        begin = ORDER.index(first.lower())
        found |= set(ORDER[begin : ORDER.index((last or first).lower()) + 1])
    return found


def read_in(*modules):
    """The settings that modules of ours read."""
    folder = Path(__file__).parents[2]
    text = "".join((folder / module).read_text() for module in modules)
    words = re.findall(r"config\.(\w+)", text)
    return {"episode_steps" if word == "bell_steps" else word for word in words} & set(ORDER)


def test_workers_and_planner_obey_the_settings_that_are_said():
    workers, planner = re.findall(r"The (?:workers|planner) obeys? (.*?)\. ", README, re.S)
    modules = ("plugin", "worker", "planner_watch")
    assert named(workers) == read_in(*(f"eplb/{module}.py" for module in modules)) | {"cpu_patches"}
    modules = ("cli", "choice", "output")
    read = read_in(*(f"eplb/{module}.py" for module in modules)) | set(SETTINGS_OF.values())
    assert named(planner) == read


def test_the_table_of_commands_names_all():
    shown = re.findall(r"^\| `eplb (\w+)` \|", README, re.M)
    assert set(shown) == set(get_command(app).commands)


def test_the_table_of_policies_names_ours_and_the_settings_that_they_take():
    rows = {name.strip("`"): settings for name, _, settings in table("## Policies")}
    assert rows.keys() == BUILT_IN.keys()
    for name, settings in rows.items():
        options = choose_policy(name).options & SETTINGS_OF.keys()
        wanted = {SETTINGS_OF[option].upper() for option in options}
        assert set(re.findall(r"`EPLB_(\w+)`", settings)) == wanted


def test_the_policy_in_the_readme_works(tmp_path, monkeypatch):
    code, project = (
        re.search(rf"```{kind}\n(.*?)```", README, re.S)[1] for kind in ("python", "toml")
    )
    project = tomllib.loads(project)["project"]
    (tmp_path / "my_policy.py").write_text(code)
    info = tmp_path / "my_policy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 1\n")
    ((name, value),) = project["entry-points"][GROUP].items()
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {value}\n")
    assert f"`EPLB_POLICY={name}`" in README
    monkeypatch.syspath_prepend(str(tmp_path))
    policy = make_policy(name, 2, 5, 2)
    heat = np.array([[[1, 1, 90, 80, 70, 1, 1, 1]] * 2, [[0] * 8] * 2])
    placement = (np.arange(20) % 10 % 8).reshape(2, 2, 5)
    wanted = policy.plan(heat, placement)
    assert (par(heat, wanted) < par(heat, placement) - 0.3).all()
    assert (policy.plan(heat * 0, placement) == placement).all()
    del sys.modules["my_policy"]


def test_flashlb_works_as_the_readme_shows(capsys):
    code = re.findall(r"```python\n(.*?)```", README, re.S)[1]
    exec(code, {})
    assert "(4, 16, 9)" in capsys.readouterr().out
