"""What `eplb stress` refuses before it begins, and what it says without running."""

import os
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from flash_eplb.collectors.synthetic import SCENARIOS
from flash_eplb.eplb.cli import app
from flash_eplb.eplb.stress.faults import FAULTS
from flash_eplb.ipc.names import lock_name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--scenario", "storm"), "--scenario is 'storm'; there are zipf, drift, antiphase"),
        (("--faults", "flood"), "--faults names 'flood'; there are planner-killed"),
        (("--faults", "random,all"), "--faults is 'random,all'; random stands for all of them: "),
        (("--faults", "shm-full, all"), "--faults is 'shm-full, all'; all stands for all of them"),
        (("--faults", "rank-slow, flood"), "--faults names 'flood'; there are planner-killed"),
        (("--ranks", "1"), "--ranks is 1; it must be from 2 to 1024"),
        (("--top-k", "65"), "--top-k is 65; it must be from 1 to 64"),
        (("--seed", "-1"), "--seed is -1; it must be "),
        (("--slots", "5"), "64 experts on 4 ranks x 5 slots: every expert needs a slot"),
        (("--weights", "--ranks", "20"), "--weights starts a process for each rank; --ranks is 20"),
        (("--json", "/nowhere/x.json"), "--json /nowhere/x.json cannot be written"),
        (("--scenario", "replay:/nowhere.npy"), "/nowhere.npy"),
        (("--ranks", "1024", "--layers", "1024"), "1024 ranks need"),
        (
            ("--ranks", "1024", "--layers", "1024", "--slots", "9"),
            "1024 layers x 1024 ranks x 9 slots are more than",
        ),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(environment, arguments, words):
    result = CliRunner().invoke(app, ["stress", *arguments])
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert words in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--layers", 4), "--layers is 4, but heat.npy has 2; leave it out"),
        (("--experts", 64), "--experts is 64, but heat.npy has 80; leave it out"),
        (("--top-k", 81), "--top-k is 81; it must be from 1 to 80"),
        (("--layers", 2, "--experts", 80, "--top-k", 80), ""),
    ],
)
def test_another_shape_than_that_of_recorded_heat_is_refused(
    environment, tmp_path, arguments, words
):
    environment.setattr("flash_eplb.eplb.stress.stress.Stress.run", lambda *_: sys.exit(7))
    environment.chdir(tmp_path)
    np.save("heat.npy", np.ones((9, 2, 80), int))
    result = CliRunner().invoke(
        app, ["stress", "--scenario", "replay:heat.npy", *map(str, arguments)]
    )
    assert (result.exit_code, words in result.stderr) == (2 if words else 7, True), result.stderr


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("EPLB_POLICY", "flashbl", "EPLB_POLICY='flashbl' names no policy"),
        ("EPLB_INITIAL_PLACEMENT", "/nowhere.json", "the expert map /nowhere.json cannot be read"),
        ("EPLB_SAVE_PLACEMENT", "/nowhere/x.json", "EPLB_SAVE_PLACEMENT=/nowhere/x.json: "),
    ],
)
def test_what_its_planner_would_refuse_is_refused_in_one_sentence(environment, name, value, words):
    def start(*_):
        raise AssertionError("it starts")

    environment.setattr("flash_eplb.eplb.stress.stress.Stress.run", start)
    environment.setenv(name, value)
    result = CliRunner().invoke(app, ["stress", "--seconds", "1"])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert words in line


def test_a_setting_that_its_policy_does_not_obey_is_named(environment):
    environment.setattr("flash_eplb.eplb.stress.stress.Stress.run", lambda *_: sys.exit(7))
    environment.setenv("EPLB_POLICY", "swap")
    environment.setenv("EPLB_ROUTING", "weighted")
    result = CliRunner().invoke(app, ["stress", "--seconds", "1"])
    assert result.exit_code == 7
    assert result.stderr == "eplb: EPLB_ROUTING does nothing with EPLB_POLICY=swap\n"


def test_without_room_in_shared_memory_it_says_so(environment):
    environment.setattr("flash_eplb.ipc.limits.free_bytes", lambda: 1 << 20)
    result = CliRunner().invoke(app, ["stress", "--seconds", "1"])
    assert result.exit_code == 2
    assert "4 ranks need" in result.stderr
    assert "/dev/shm has 1.0 MiB free" in result.stderr


def test_a_session_whose_names_cannot_be_made_is_refused_at_the_start(session, environment):
    lock = "/dev/shm" + lock_name(session)
    os.symlink("/dev/null", lock)
    environment.setenv("EPLB_SESSION", session)
    environment.setattr("flash_eplb.eplb.stress.stress.Stress.run", lambda *_: sys.exit(7))
    result = CliRunner().invoke(app, ["stress", "--seconds", "1"])
    os.unlink(lock)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"eplb: the lock of session {session!r} ({lock}) cannot be ")


def test_without_room_for_its_files_it_says_so(environment, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    environment.setattr("flash_eplb.eplb.stress.figures.os.posix_fallocate", full)
    environment.setattr("tempfile.tempdir", str(tmp_path))
    result = CliRunner().invoke(app, ["stress", "--seconds", "1"])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"eplb: {tmp_path}/eplb-stress-")
    assert " has no room for the stress's figures: No space left on device; make " in result.stderr
    assert os.listdir(tmp_path) == []
    environment.setattr("tempfile.tempdir", str(tmp_path / "nothing"))
    result = CliRunner().invoke(app, ["stress", "--seconds", "1"])
    assert result.exit_code == 2
    assert "set TMPDIR to a folder in which the stress can write" in result.stderr


def test_where_no_mount_can_be_private_it_says_so(environment, tmp_path):
    (tmp_path / "unshare").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "unshare").chmod(0o755)
    for path in (f"{tmp_path}:{os.environ['PATH']}", str(tmp_path / "nothing")):
        environment.setenv("PATH", path)
        result = CliRunner().invoke(app, ["stress", "--faults", "shm-full"])
        assert result.exit_code == 2
        assert "shm-full needs a mount namespace of its own" in result.stderr


def test_nothing_is_mounted_where_others_see_it(environment):
    here = os.readlink("/proc/self/ns/mnt")
    result = CliRunner().invoke(app, ["stress", "--faults", "shm-full", "--outside", here])
    assert (result.exit_code, result.stderr) == (
        2,
        f"eplb: shm-full needs another mount namespace than {here}; name the other --faults\n",
    )


def test_where_it_starts_again_with_a_private_mount_it_warns_once(stress, tmp_path):
    bin = tmp_path / "bin"
    bin.mkdir()
    every_option = 'while [ "${1#--}" != "$1" ]; do shift; done'
    (bin / "unshare").write_text(f'#!/bin/sh\n{every_option}\nexec "$@" --outside another\n')
    (bin / "mount").write_text("#!/bin/sh\necho mount: no tmpfs here >&2\nexit 32\n")
    for file in bin.iterdir():
        file.chmod(0o755)
    variables = {"PATH": f"{bin}:{os.environ['PATH']}", "EPLB_FOO": "1"}
    assert stress("--faults", "shm-full", **variables) == (
        2,
        "",
        "eplb: EPLB_FOO is no setting of ours: misspelt?\n"
        "eplb: shm-full needs a /dev/shm of its own: mount: no tmpfs here; name the other "
        "--faults\n",
    )


def test_the_list_names_all_scenarios_and_faults(environment):
    result = CliRunner().invoke(app, ["stress", "--list"])
    assert result.exit_code == 0
    for name in (*SCENARIOS, *FAULTS):
        assert f" {name} " in result.stdout
