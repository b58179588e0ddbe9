import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.megatron.kernel_cases import CASES


@pytest.mark.skipif(find_spec("triton") is None, reason="torch's builds for a CPU come without Triton")
def test_the_kernel_equals_double_precision_in_tritons_interpreter():
    """In a process of its own: Triton asks once, when it is imported, whether it interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tests.megatron.kernel_cases"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [case.__name__ for case in CASES]
