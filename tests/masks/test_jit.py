from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedmask_flwr import jit

ROOT = Path(__file__).parents[2]
needs_numba = pytest.mark.skipif(not jit.available(), reason="the optional extra fast")
KERNEL = """
from fedmask_flwr.jit import compiled

@compiled()
def twice(x):
    return x + x

@compiled()
def run(x):
    return twice(x) + 1
"""
SHORT = "import sys, kernel; print(kernel.run(20.5), kernel.run(3), 'numba' in sys.modules, kernel.run._kept)"


def test_these_tests_have_numba():
    """`make` installs the extra: without it, whatever compares machine code with numpy would be skipped unseen."""
    assert jit.available() or os.environ.get("FEDMASK_JIT") == "0"


def ran(folder, code, **env):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=False, cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@needs_numba
def test_machine_code_is_kept_and_a_broken_file_is_survived(tmp_path):
    (tmp_path / "kernel.py").write_text(KERNEL)
    assert ran(tmp_path, SHORT) == ["42.0", "7", "True", "True"]
    kept = [*tmp_path.rglob("*.nbi"), *tmp_path.rglob("*.nbc")]
    assert len(kept) == 3
    for file in kept:
        file.write_bytes(b"not a pickle")
    assert ran(tmp_path, SHORT) == ["42.0", "7", "True", "False"]


@needs_numba
def test_no_folder_to_write_to_is_survived(tmp_path):
    """As in a container whose file system is read-only; code from a string has no folder at all."""
    code = f"import sys, types; kernel = types.ModuleType('kernel'); exec({KERNEL!r}, vars(kernel)); "
    assert ran(tmp_path, code + SHORT.replace("import sys, kernel; ", "")) == ["42.0", "7", "True", "False"]


def test_numba_is_not_imported_before_it_is_needed(tmp_path):
    code = (
        "import sys, fedmask_flwr.masks.fused, fedmask_flwr.jit as j; print('numba' in sys.modules, j.available()"
    )
    assert ran(tmp_path, code + ", 'numba' in sys.modules)", FEDMASK_JIT="0") == ["False", "False", "False"]


def test_no_numba_and_a_numba_that_fails(tmp_path):
    code = "from fedmask_flwr import jit; print(jit.available())"
    hide = "import sys; sys.modules['numba'] = None; "
    assert ran(tmp_path, hide + code) == ["False"]
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 1.0 or less')")
    assert ran(tmp_path, code) == ["False"]


@needs_numba
def test_a_wrong_call_raises():
    @jit.compiled()
    def first(x):
        return x[0]

    with pytest.raises(Exception, match=r"getitem|nopython"):
        first(3)
