import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def moving(session):
    from moving import Moving

    made = []

    def make(**options):
        made.append(Moving(session, **options))
        return made[-1]

    yield make
    for one in made:
        for segment in one.segments:
            segment.close()
        one.close()
