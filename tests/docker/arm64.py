"""What one machine computes, for another to compare: ``arm64.py OURS.json [THEIRS.json]``.

Runs on both machines, in whatever torch each has. OURS gets: hashes of all that must be the same bits everywhere;
a federation over the Method API, every frame of it in every codec and what its reader made of it; the bundled apps'
run, in this process; and, when there are THEIRS, what this machine makes of the other's frames.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS)]

import numpy as np  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402

import fedmask_flwr  # noqa: E402
from fedmask_flwr.masks import Backbone, Key, bernoulli, derive, initialise, thresholds, weights_digest, words  # noqa: E402
from fedmask_flwr.masks.closeness import closeness  # noqa: E402
from fedmask_flwr.masks.keyed import words_torch  # noqa: E402
from fedmask_flwr.methods import Training, Turn, Update, View, resolve  # noqa: E402
from fedmask_flwr.train import evaluate, train  # noqa: E402
from fedmask_flwr.wire import Frame, pack, read  # noqa: E402

CODECS = ("rice", "entropy", "context", "auto")
CLIENTS, ROUNDS, EPOCHS, SEED = 2, 2, 8, 7
WIDE = {"in_shape": (8,), "num_classes": 3, "hidden": (64, 32)}
DIGEST = b"machines"


def sha(*values):
    """SHA-256 of arrays and bytes, values little-endian."""
    state = hashlib.sha256()
    for value in values:
        state.update(value if isinstance(value, bytes) else value.astype(value.dtype.newbyteorder("<")).tobytes())
    return state.hexdigest()


def facts():
    """Hash of everything that must be the same bits on every machine."""
    n = 200_003  # more than two chunks, and no round number
    key = derive(SEED, "machines", 1)
    theta = (words(Key(3, 4), n).astype(np.float64) + 2.0**31) / 2.0**32
    theta[:4] = 0.0, 1.0, 2.0**-40, 0.5
    found = {
        "words": sha(words(key, n)),
        "words by torch": sha(words_torch(key, n, "cpu").numpy()),
        "thresholds": sha(thresholds(theta)),
        "drawn mask": sha(np.packbits(bernoulli(key, thresholds(theta)))),
        "drawn mask, float32": sha(np.packbits(bernoulli(key, thresholds(theta.astype(np.float32))))),
        "closeness": sha(closeness(theta, key)),
    }
    shapes = {"mlp": (8, 8), "lenet5": (1, 28, 28), "har": (9, 128), "conv4": (3, 32, 32)}
    for name, shape in shapes.items():
        for scale in ("signed_e", "kaiming_keep", "glorot"):
            options = (("in_shape", shape), ("num_classes", 10))
            model = Backbone(f"fedmask_flwr.models:{name}", f"seed:{SEED}:{scale}", options).build()
            found[f"frozen weights of {name}, {scale}"] = weights_digest(model).hex()
    spec = importlib.util.spec_from_file_location("golden_make", TESTS / "golden/make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    for kind, name in make.ours():
        kept = (TESTS / "golden" / f"{name}.bin").read_bytes()
        found[f"golden {name}, read"] = make.fingerprint(make.decode(kind, kept).payload)
        if "+" not in name and not name.startswith("fuse"):  # the others' bytes are other libraries'
            found[f"golden {name}, written"] = sha(make.encode(kind, name))
    found["golden auto, written"] = sha(make.encode("bits", "auto"))
    return found


def method_of(model):
    """DeltaMask for that network."""
    kind = resolve("deltamask")
    return kind(kind.layout(model), model, kind.Config())


def network():
    """The network with its frozen weights."""
    from fedmask_flwr.models import mlp

    model = mlp(**WIDE)
    initialise(model, f"seed:{SEED}")
    return model


def turn_of(round_, client):
    """Key and place of a turn."""
    return Turn(SEED, round_, ROUNDS, client)


def understand(method, frame, round_, known, fields):
    """Read a frame as the other end does."""
    expect = {name: numel for name, (_, numel) in fields.items()}
    return read(Frame.parse(frame), digest=DIGEST, round_=round_, known=known, expect=expect).payload


def federation():
    """A federation over the Method API, frame by frame; all codecs are exact, so it trains once for all."""
    method = method_of(network())
    state, out = method.init(), []
    x, y = (torch.from_numpy(a) for a in tiny.blobs("train", ""))
    for round_ in range(1, ROUNDS + 1):
        down = pack(method.broadcast(state), digest=DIGEST, round_=round_, known=method.heard({}))
        ups, masks, updates = {codec: [] for codec in CODECS}, [], []
        for client in range(CLIENTS):
            got, turn = understand(method, down, round_, method.heard({}), method.down({})), turn_of(round_, client)
            model = network()
            optimizer = method.begin(got, model, Training(), turn, {})
            mine = slice(client, None, CLIENTS)
            train(model, optimizer, x[mine], y[mine], epochs=EPOCHS, batch_size=10, key=(SEED, round_, client))
            reply, known = method.finish(got, model, optimizer, turn, {}), method.known(got, turn, {})
            for codec in CODECS:
                frame = pack(reply, digest=DIGEST, round_=round_, known=known, codecs={"bits": codec})
                ups[codec].append(frame.hex())
            masks.append(sha(reply.bits["mask"]))
            updates.append(Update(client, reply, 1.0, 0.0))
        state = method.aggregate(state, iter(updates))
        out.append({"down": down.hex(), "up": ups, "masks": masks})
    end = pack(method.broadcast(state), digest=DIGEST, round_=0, known=method.heard({}))
    return {"rounds": out, "end": sha(end), "accuracy": accuracy(method, state)}


def accuracy(method, state):
    """Of the expected network, on the test blobs."""
    from fedmask_flwr.masks import frozen_weights

    model = network()
    method.install(method.broadcast(state), model, frozen_weights(model, method.spec), View("expected"))
    x, y = (torch.from_numpy(a) for a in tiny.blobs("test", ""))
    return evaluate(model, x, y)[1]


def follow(theirs, codec):
    """Be the server of the other machine's devices: the same broadcasts, and the masks that they meant.

    Gives the hash of each broadcast, of each mask and of the end, as this machine makes them.
    """
    method = method_of(network())
    state, out = method.init(), []
    for round_, line in enumerate(theirs["rounds"], 1):
        down = pack(method.broadcast(state), digest=DIGEST, round_=round_, known=method.heard({}))
        masks, updates = [], []
        for client, up in enumerate(line["up"][codec]):
            got, turn = understand(method, down, round_, method.heard({}), method.down({})), turn_of(round_, client)
            fields, known = method.up(got, {})[0], method.known(got, turn, {})
            reply = understand(method, bytes.fromhex(up), round_, known, fields)
            masks.append(sha(reply.bits["mask"]))
            updates.append(Update(client, reply, 1.0, 0.0))
        state = method.aggregate(state, iter(updates))
        out.append({"down": down.hex(), "masks": masks})
    end = pack(method.broadcast(state), digest=DIGEST, round_=0, known=method.heard({}))
    return {"rounds": out, "end": sha(end)}


def apps(codec, folder):
    """A run of the bundled apps on Flower's messages, in this process."""
    from flwr.app import Context, RecordDict
    from loopback import LoopbackGrid

    packaged = Path(fedmask_flwr.__file__).parent / "_app"  # where a wheel has them
    sys.path.append(str(packaged if packaged.exists() else TESTS.parent))
    from client_app.main import app
    from fedmask_flwr.flower.apps import serve

    config = tiny.run_config(
        out=str(folder / codec), memory_dir=str(folder / "memory"), codec=codec, num_server_rounds=ROUNDS,
        local_epochs=2, min_nodes=CLIENTS, clients=CLIENTS, seed=SEED,
    )  # fmt: skip
    serve(LoopbackGrid(app, CLIENTS, config), Context(1, 1, {}, RecordDict(), config))
    lines = [json.loads(line) for line in (folder / codec / "metrics.jsonl").read_text().splitlines()]
    keys = ("accuracy_expected", "uplink_bytes", "downlink_bytes", "clients_ok", "clients_failed")
    return [{key: line.get(key) for key in keys} for line in lines]


def main(ours, theirs=None):
    """Write what this machine computes."""
    began = time.monotonic()
    tiny.one_thread()
    found = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__,
             "numpy": np.__version__, "package": fedmask_flwr.__file__,
             "fuse": importlib.util.find_spec("pyfusefilter") is not None}  # fmt: skip
    steps = {"started": 0.0}

    def step(name):
        steps[name] = round(time.monotonic() - began, 1)
        print(f"{steps[name]:7.1f} s  {name}", flush=True)

    found["facts"] = facts()
    step("facts")
    found["federation"] = federation()
    step("federation")
    if theirs is not None:
        told = json.loads(Path(theirs).read_text())["federation"]
        found["follows"] = {codec: follow(told, codec) for codec in CODECS}
        step("follows")
    with tempfile.TemporaryDirectory() as folder:
        found["apps"] = {codec: apps(codec, Path(folder)) for codec in CODECS}
    step("apps")
    Path(ours).write_text(json.dumps(found | {"steps": steps}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
