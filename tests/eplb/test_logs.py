import logging

import pytest

from flash_eplb.eplb.logs import configure


@pytest.fixture
def log(monkeypatch):
    """Our logger as it is in a fresh process."""
    logger = logging.getLogger("flash_eplb")
    level, propagate = logger.level, logger.propagate
    monkeypatch.setattr(logger, "handlers", [])
    yield logger
    logger.setLevel(level)
    logger.propagate = propagate


def test_one_line_a_message_on_standard_error(log, capsys):
    configure("INFO")
    configure("INFO")
    logging.getLogger("flash_eplb.worker").info("a %s", "message")
    logging.getLogger("flash_eplb.worker").debug("not this one")
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert " INFO flash_eplb.worker [" in line
    assert line.endswith("] a message")


def test_the_latest_level_counts(log, capsys):
    configure("ERROR")
    logging.getLogger("flash_eplb.planner").warning("too little")
    configure("DEBUG")
    logging.getLogger("flash_eplb.planner").debug("enough")
    assert "too little" not in (err := capsys.readouterr().err)
    assert "enough" in err
