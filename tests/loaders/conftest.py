import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from cluster import Cluster


@pytest.fixture
def cluster(session):
    made = []

    def make(**sizes):
        made.append(Cluster(session, **sizes))
        return made[-1]

    yield make
    for one in made:
        one.close()
