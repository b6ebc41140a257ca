import subprocess
import sys

import pytest

from flash_eplb import __version__
from flash_eplb.eplb.child import command_of


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no -P")
def test_a_user_s_module_in_the_working_folder_is_not_taken_for_python_s(tmp_path):
    for name in ("signal", "queue", "random"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')")
    found = subprocess.run(
        command_of("cli", "version"), cwd=tmp_path, capture_output=True, text=True
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, f"{__version__}\n", "")
