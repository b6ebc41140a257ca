"""Lets the tests here import the helper modules beside them, whatever pytest's import mode."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_engine import FakeEngine


@pytest.fixture
def engine(session):
    made = FakeEngine(session)
    yield made
    made.close()
