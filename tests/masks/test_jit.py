from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ways import needs_numba

from fedmask_flwr import jit

ROOT = Path(__file__).parents[2]
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


@pytest.fixture
def unloaded(monkeypatch):
    """As in a process that has not loaded numba, nor asked for it."""
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    monkeypatch.setitem(jit._passed, "positions", 0)
    monkeypatch.setattr(jit, "available", lambda: True)


def test_numba_is_not_loaded_for_little(unloaded, monkeypatch):
    monkeypatch.setattr(jit, "available", lambda: pytest.fail("asked for numba"))
    assert not jit.pays(jit.PAYS_FROM - 1)
    for _ in range(jit.PAYS_AFTER // jit.LOADED_FROM):
        assert not jit.pays(jit.LOADED_FROM - 1)


def test_it_is_loaded_for_one_large_vector(unloaded):
    assert jit.pays(jit.PAYS_FROM)


def test_it_is_loaded_once_many_were_asked_for(unloaded):
    half = jit.PAYS_FROM // 2
    found = [jit.pays(half) for _ in range(jit.PAYS_AFTER // half + 3)]
    assert found == [False] * (jit.PAYS_AFTER // half - 1) + [True] * 4


def test_less_is_enough_once_numba_is_loaded(monkeypatch):
    monkeypatch.setattr(jit, "available", lambda: True)
    monkeypatch.setitem(sys.modules, "numba", jit)
    assert jit.pays(jit.LOADED_FROM)
    assert not jit.pays(jit.LOADED_FROM - 1)
