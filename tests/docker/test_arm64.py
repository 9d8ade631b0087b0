"""arm64 under emulation: the same bits as here, and each machine reads the other's frames.

For ``make arm64`` alone: the first run takes a quarter of an hour, most of it to make an arm64 Debian under
emulation. FEDMASK_ARM64 is the folder that keeps it. What cannot be emulated is a failure here, not a skip. Nothing
here says how fast such a device is.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from stack import ROOT, sh

pytestmark = [pytest.mark.slow, pytest.mark.docker, pytest.mark.arm64]
HERE = Path(__file__).parent
KEPT = Path(os.environ.get("FEDMASK_ARM64", Path(tempfile.gettempdir()) / "fedmask-arm64"))
HOUR = 3600.0
UV = shutil.which("uv") or str(ROOT / ".uv/bin/uv")
CODECS = ("rice", "entropy", "context", "auto")


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """What this machine computes, what the emulated one does, and what this one makes of the other's frames."""
    folder = tmp_path_factory.mktemp("machines")
    here, there, again = (folder / name for name in ("here.json", "there.json", "again.json"))
    sh(sys.executable, HERE / "arm64.py", here, OMP_NUM_THREADS="1")
    sh(UV, "build", "-q", "--wheel", "--out-dir", folder, ROOT)
    KEPT.mkdir(parents=True, exist_ok=True)
    script("root", KEPT)
    script("run", KEPT, next(folder.glob("*.whl")), there, here)
    sh(sys.executable, HERE / "arm64.py", again, there, OMP_NUM_THREADS="1")
    return tuple(json.loads(path.read_text()) for path in (here, there, again))


def script(*arguments):
    """Run arm64.sh; what it says is seen at once, since it takes long."""
    done = subprocess.run(
        ["bash", HERE / "arm64.sh", *arguments], check=False, timeout=HOUR, env=os.environ | {"UV": UV}
    )
    assert done.returncode == 0


def test_it_was_an_arm64_without_pyfusefilter(machines):
    here, there, _ = machines
    assert (here["machine"], there["machine"]) == ("x86_64", "aarch64")
    assert not there["fuse"]
    assert "/opt/fedmask/" in there["package"]  # the wheel, not the checkout


def test_all_that_both_ends_must_agree_on_is_the_same_bits(machines):
    """Words, drawn masks, closeness classes, frozen weights, and the frames that our own encoders write."""
    here, there, _ = machines
    assert set(here["facts"]) == set(there["facts"])
    assert {name for name in here["facts"] if here["facts"][name] != there["facts"][name]} == set()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("server", ["here", "there"])
def test_a_server_of_one_understands_devices_of_the_other(machines, server, codec):
    """The same broadcasts, the masks that were meant, and the same end."""
    here, there, again = machines
    devices, follower = (there, again) if server == "here" else (here, there)
    told, found = devices["federation"], follower["follows"][codec]
    assert [line["down"] for line in found["rounds"]] == [line["down"] for line in told["rounds"]]
    assert [line["masks"] for line in found["rounds"]] == [line["masks"] for line in told["rounds"]]
    assert found["end"] == told["end"]


def test_it_learns_as_well(machines):
    """Trained floats may differ in their last bits, so bits of the learned masks may: not their worth."""
    ours, theirs = (machine["federation"]["accuracy"] for machine in machines[:2])
    assert ours > 0.8
    assert theirs == pytest.approx(ours, abs=0.06)


@pytest.mark.parametrize("codec", CODECS)
def test_the_bundled_apps_take_as_many_bytes(machines, codec):
    here, there, _ = machines
    for ours, theirs in zip(here["apps"][codec], there["apps"][codec], strict=True):
        assert (theirs["clients_ok"], theirs["clients_failed"]) == (2, 0)
        assert theirs["uplink_bytes"] == pytest.approx(ours["uplink_bytes"], rel=0.1, abs=8)
        assert theirs["accuracy_expected"] == pytest.approx(ours["accuracy_expected"], abs=0.15)
