"""Every Triton kernel goes through the compiler as well, for a GPU that need not be here."""

import os
import subprocess
import sys
from pathlib import Path


def test_every_kernel_compiles_for_hopper():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        "_attend _dense_int4 _emit _gather _hash _linear_int4 _merge _merge_and_prepare _pick _prepare _rank _row _rows "
        "_sample _scan _score_chosen _score_pages _sift _spread _take_turns" in done.stdout
    )
