import contextlib
import functools
import time

import pytest

from flash_eplb.eplb.updates import follow_updates


class Log(list):
    """A worker class like vLLM's, and what was called, in order."""

    def __init__(self, fail=""):
        self.took, self.given_up = [], []

        def method(name):
            def call(worker, *args):
                self.append(name)
                if name == fail:
                    raise OSError("no such file")
                return args

            call.__name__ = name
            return call

        names = [
            "reload_weights",
            "save_sharded_state",
            "start_weight_update",
            "update_weights",
            "finish_weight_update",
        ]
        self.worker = type("Worker", (), {name: method(name) for name in names})
        follow_updates(self.worker, self.begin, self.end, self.give_up)

    def is_open(self):
        return self.count("begin") > self.count("end")

    def give_up(self, why):
        self.given_up.append(why)
        return self.is_open()

    def begin(self):
        """Opens an update, unless one is open."""
        opened = not self.is_open()
        self.append("begin")
        return opened

    def end(self, took):
        self.append("end")
        self.took.append(took)


def test_a_reload_begins_and_ends():
    log = Log()
    assert log.worker().reload_weights("path") == ("path",)
    assert log == ["begin", "reload_weights", "end"]


@pytest.mark.parametrize("name", ["reload_weights", "save_sharded_state"])
def test_the_end_is_told_how_long_the_call_has_taken(name):
    log = Log()
    worker = type("Worker", (), {name: lambda self: time.sleep(0.05)})
    follow_updates(worker, log.begin, log.end, log.give_up)
    getattr(worker(), name)()
    (took,) = log.took
    assert 0.05 <= took < 5


def test_an_update_begins_with_its_start_and_ends_with_its_finish():
    log, worker = Log(), None
    worker = log.worker()
    worker.start_weight_update()
    worker.update_weights({})
    worker.finish_weight_update()
    assert log == [
        "begin", "start_weight_update", "update_weights", "finish_weight_update", "end"
    ]  # fmt: skip


def test_a_write_that_fails_is_not_ended(caplog):
    log = Log(fail="reload_weights")
    with pytest.raises(OSError, match="no such file"):
        log.worker().reload_weights()
    assert log == ["begin", "reload_weights"]
    assert log.given_up == ["reload_weights has failed"]
    assert "reload_weights failed: no expert moves until weights have been updated" in caplog.text


def test_nothing_is_written_if_it_may_not_begin():
    log = Log()

    def refuse():
        raise RuntimeError("not now")

    worker = type("Worker", (), {"reload_weights": lambda self: log.append("written")})
    follow_updates(worker, refuse, log.end, log.give_up)
    with pytest.raises(RuntimeError, match="not now"):
        worker().reload_weights()
    assert log == []


def test_a_second_state_does_not_wrap_again():
    log = Log()
    other = functools.partial(log.append, "other")
    follow_updates(log.worker, other, other, log.give_up)
    log.worker().reload_weights()
    assert log == ["begin", "reload_weights", "end"]


def test_a_start_that_is_refused_ends_what_it_has_opened():
    log = Log(fail="start_weight_update")
    with pytest.raises(OSError):
        log.worker().start_weight_update()
    assert log == ["begin", "start_weight_update", "end"]


def test_a_second_start_that_is_refused_leaves_the_update_to_its_finish(caplog):
    """As vLLM says then: "Call finish_weight_update first"; it has written nothing."""
    log = Log(fail="start_weight_update")
    log.begin()
    with pytest.raises(OSError):
        log.worker().start_weight_update()
    assert log == ["begin", "begin", "start_weight_update"]
    assert log.given_up == []
    assert "no expert moves" not in caplog.text


def test_an_update_that_fails_half_way_says_that_experts_stay(caplog):
    log = Log(fail="update_weights")
    worker = log.worker()
    worker.start_weight_update()
    with pytest.raises(OSError):
        worker.update_weights({})
    assert log == ["begin", "start_weight_update", "update_weights"]
    assert log.given_up == ["update_weights has failed"]
    words = "update_weights failed: no expert moves from the start of an update until weights have"
    assert words in caplog.text


@pytest.mark.parametrize("name", ["finish_weight_update", "update_weights"])
def test_a_call_that_fails_without_an_update_says_nothing_of_experts(name, caplog):
    """As where it was never started, or nothing is balanced here."""
    log = Log(fail=name)
    with pytest.raises(OSError):
        getattr(log.worker(), name)()
    assert log == [name]
    assert "no expert moves" not in caplog.text


@pytest.mark.parametrize("fail", ["", "save_sharded_state"])
def test_what_is_saved_is_read_with_the_experts_at_home(fail):
    """Whoever loads it does so by the placement of the start."""
    log = Log(fail)
    with pytest.raises(OSError) if fail else contextlib.nullcontext():
        assert log.worker().save_sharded_state("path") == ("path",)
    assert log == ["begin", "save_sharded_state", "end"]


def test_a_save_in_the_middle_of_an_update_does_not_end_it():
    log = Log()
    log.begin()
    log.worker().save_sharded_state()
    assert log == ["begin", "begin", "save_sharded_state"]
