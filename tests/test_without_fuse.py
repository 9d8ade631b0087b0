"""A device or server without pyfusefilter, which has no arm64 wheel: only encoding with "fuse" is missing."""

from __future__ import annotations

import json
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
RUNS = """
import loopback, tiny
from client_app.main import app
from fedmask_flwr.flower.apps import serve
from fedmask_flwr.flower.patience import SilenceError
from flwr.app import Context, RecordDict

def run(name, codec, app=app):
    out = Path(sys.argv[1]) / name
    config = tiny.run_config(out=str(out), memory_dir=str(out) + "-memory", codec=codec, num_server_rounds=2)
    try:
        serve(loopback.LoopbackGrid(app, 2, config), Context(1, 1, {}, RecordDict(), config))
    except SilenceError as error:
        return str(error)
    return [json.loads(line)["clients_ok"] for line in (out / "metrics.jsonl").read_text().splitlines()]

def able(message, context):
    block(False)
    try:
        return app(message=message, context=context)
    finally:
        block(True)

print(json.dumps({"auto": run("auto", "auto"), "fuse8": run("fuse8", "fuse8"), "able": run("able", "fuse8", able)}))
"""


def without(code, *arguments):
    """Run the code without pyfusefilter; the lines that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *map(str, arguments)], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


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
    assert sorted(said) == sorted(each)


def test_asking_for_fuse_names_the_ways_out():
    said = without(
        "for codec in ('fuse8', 'fuse16', 'fuse8+png'):\n"
        "    try: make.encode('bits', codec)\n"
        "    except ImportError as error: print(error)\n"
    )
    assert len(said) == 3
    for line in said:
        for remedy in ("pip install pyfusefilter", "BUILD_PYFUSEFILTER=1", "'auto'"):
            assert remedy in line


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Replies a round, or why the run failed: with auto, with fuse8, and with fuse8 on devices that have it."""
    return json.loads(without(RUNS, tmp_path_factory.mktemp("runs"))[-1])


def test_a_run_of_such_devices(runs):
    assert runs["auto"] == [2, 2]


def test_a_fuse_run_of_such_devices_fails_and_names_the_ways_out(runs):
    for remedy in ("2 rounds in a row", "pip install pyfusefilter", "BUILD_PYFUSEFILTER=1"):
        assert remedy in runs["fuse8"]


def test_such_a_server_serves_devices_that_have_it(runs):
    """Reading needs numpy alone, so a server does not refuse the codec."""
    assert runs["able"] == [2, 2]
