"""A device or server without pyfusefilter, which has no arm64 wheel: only encoding with "fuse" is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# In a process of its own, where the package cannot be imported, whatever ran before.
PRELUDE = f"""
import contextlib, importlib.util, json, sys
from pathlib import Path
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / "flower")!r}, {str(TESTS.parent)!r}]

def block(on):
    for name in ("pyfusefilter", "pyfusefilter._xorfilter"):
        sys.modules.pop(name, None)
        if on:
            sys.modules[name] = None

block(True)
spec = importlib.util.spec_from_file_location("golden_make", {str(TESTS / "golden/make.py")!r})
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)
"""
RUN = """
import loopback
from client_app.main import app
from fedmask_flwr.flower.apps import serve
from flwr.app import Context, RecordDict
import tiny

def run(out, codec, app=app):
    config = tiny.run_config(out=str(out), memory_dir=str(out) + "-memory", codec=codec, num_server_rounds=2)
    serve(loopback.LoopbackGrid(app, 2, config), Context(1, 1, {}, RecordDict(), config))
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
"""


def without(code, *arguments):
    """Run the code without pyfusefilter; what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *map(str, arguments)], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.split("\n")


def test_every_codec_but_fuse_writes_and_every_codec_reads():
    said = without(
        "kept = json.loads((make.HERE / 'decoded.json').read_text())\n"
        "for kind, name in make.ours():\n"
        "    data = (make.HERE / f'{name}.bin').read_bytes()\n"
        "    assert make.fingerprint(make.decode(kind, data).payload) == kept[name], name\n"
        "    try: found = make.encode(kind, name)\n"
        "    except ImportError: print('cannot write', name)\n"
        "    else: assert make.fingerprint(make.decode(kind, found).payload) == kept[name], name\n"
        "make.encode('bits', 'auto')\n"
    )
    each = [f"cannot write fuse{n}{e}" for n in (8, 16) for e in ("", "+png", "+zstd")]
    assert sorted(filter(None, said)) == sorted(each)


@pytest.mark.parametrize("codec", ["fuse8", "fuse16", "fuse8+png"])
def test_asking_for_fuse_names_the_ways_out(codec):
    said = "\n".join(without(f"try: make.encode('bits', {codec!r})\nexcept ImportError as error: print(error)\n"))
    for remedy in ("pip install pyfusefilter", "BUILD_PYFUSEFILTER=1", "'auto'"):
        assert remedy in said


def test_a_run_of_such_devices(tmp_path):
    said = without(f"{RUN}print(run(sys.argv[1], 'auto')[-1]['clients_ok'])", tmp_path / "run")
    assert "2" in said
    assert (tmp_path / "run/mask.fedmask").exists()


def test_a_fuse_run_of_such_devices_fails_and_names_the_ways_out(tmp_path):
    said = "\n".join(
        without(
            f"{RUN}from fedmask_flwr.flower.patience import SilenceError\n"
            "try: run(sys.argv[1], 'fuse8')\n"
            "except SilenceError as error: print('ended:', error)\n",
            tmp_path / "run",
        )
    )
    reason = said.partition("ended:")[2]
    for remedy in ("pip install pyfusefilter", "BUILD_PYFUSEFILTER=1"):
        assert remedy in reason


def test_such_a_server_serves_devices_that_have_it(tmp_path):
    """Reading needs numpy alone, so a server does not refuse the codec."""
    said = without(
        f"{RUN}"
        "def able(message, context):\n"
        "    block(False)\n"
        "    try: return app(message=message, context=context)\n"
        "    finally: block(True)\n"
        "print(run(sys.argv[1], 'fuse8', able)[-1]['clients_ok'])",
        tmp_path / "run",
    )
    assert "2" in said
