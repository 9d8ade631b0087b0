"""A Flower app of ten lines, and executables that only look like Flower's: for tests of the runner."""

from __future__ import annotations

import sys
import textwrap
import time
from pathlib import Path

from fedmask_flwr.simulation import reaper

LICENSE = Path(__file__).resolve().parents[1] / "LICENSE"


def app(root: Path) -> Path:
    """Modes: ok, fail (raises after a round), hang (sleeps after a round)."""
    for name in ("server_app", "client_app"):
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").write_text("")
    (root / "LICENSE").write_bytes(LICENSE.read_bytes())
    (root / "pyproject.toml").write_text(
        textwrap.dedent("""
        [project]
        name = "standin"
        version = "0.1.0"
        description = "a stand-in"
        license = "Apache-2.0"
        [tool.flwr.app]
        publisher = "fedmask"
        fab-include = ["server_app/**/*.py", "client_app/**/*.py", "/LICENSE"]
        [tool.flwr.app.components]
        serverapp = "server_app.main:app"
        clientapp = "client_app.main:app"
        [tool.flwr.app.config]
        num-server-rounds = 2
        out = ""
        mode = "ok"
        """)
    )
    (root / "client_app" / "main.py").write_text(
        textwrap.dedent("""
        from flwr.app import Message, MetricRecord, RecordDict
        from flwr.clientapp import ClientApp
        app = ClientApp()
        @app.train()
        def train(msg, context):
            return Message(RecordDict({"metrics": MetricRecord({"n": 1})}), reply_to=msg)
        """)
    )
    (root / "server_app" / "main.py").write_text(
        textwrap.dedent("""
        import json, time
        from pathlib import Path
        from flwr.app import ConfigRecord, Message, RecordDict
        from flwr.serverapp import ServerApp
        app = ServerApp()
        @app.main()
        def main(grid, context):
            config = context.run_config
            while len(list(grid.get_node_ids())) < 3:
                time.sleep(0.1)
            for number in range(1, config["num-server-rounds"] + 1):
                record = RecordDict({"config": ConfigRecord({"round": number})})
                sent = [Message(record, node, "train") for node in grid.get_node_ids()]
                ok = sum(not reply.has_error() for reply in grid.send_and_receive(sent))
                with (Path(config["out"]) / "metrics.jsonl").open("a") as f:
                    f.write(json.dumps({"round": number, "clients_ok": ok}) + "\\n")
                if config["mode"] == "fail":
                    raise ValueError("told to fail")
                if config["mode"] == "hang":
                    time.sleep(1000)
        """)
    )
    return root


FAKE = """\
#!{python}
import http.server, json, os, sys, threading, time, tomllib
from pathlib import Path
name, words = Path(sys.argv[0]).name, sys.argv[1:]
if name == "flower-superlink":
    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200); self.end_headers()
        def log_message(self, *a):
            pass
    print("a SuperLink says hello", flush=True)
    if os.environ.get("FAKE_SUPERLINK") == "refuses":
        sys.exit(3)
    server = http.server.HTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Health)
    if os.environ.get("FAKE_SUPERLINK") == "dies":
        threading.Timer(2.0, os._exit, [9]).start()
    server.serve_forever()
elif words[0] == "run":
    config = tomllib.loads(Path(words[words.index("--run-config") + 1]).read_text())
    Path("seen.json").write_text(json.dumps([config, words, os.getcwd()]))
    print("a warning first")
    if os.environ.get("FAKE_RUN") == "refuses":
        print(json.dumps(dict(success=False, **{{"error-message": "Using SuperLink: sim\\n\\nno such key"}})))
    elif os.environ.get("FAKE_RUN") == "breaks":
        sys.exit("boom")
    else:
        with open(config["out"] + "/metrics.jsonl", "a") as f:
            f.write(json.dumps(dict(round=1)) + "\\n" + json.dumps(dict(round=2)) + "\\n")
        print(json.dumps({{"success": True, "run-id": "42"}}))
elif words[0] == "log":
    assert words[1] == "42"
    print("\\x1b[91mERROR\\x1b[0m a ServerApp says why", flush=True)
    time.sleep(float(os.environ.get("FAKE_SECONDS", "0.5")))
elif words[0] == "list":
    status = os.environ.get("FAKE_STATUS", "finished:completed")
    print(json.dumps(dict(success=True, runs=[{{"status": status, "status-details": "because"}}])))
"""


def fake_flower(folder: Path) -> Path:
    """Make a folder of executables, to be used as `scripts()`."""
    folder.mkdir()
    for name in ("flwr", "flower-superlink", "flower-superexec"):
        (folder / name).write_text(FAKE.format(python=sys.executable))
        (folder / name).chmod(0o755)
    return folder


def wait_gone(token: str, folder: str = "", seconds: float = 30.0) -> list[int]:
    """Give the processes with the token that are still there after a while."""
    deadline = time.monotonic() + seconds
    while (left := reaper.tagged(token, folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def wait_for(path: Path, seconds: float = 240.0) -> str:
    """Give a file's text once there is some."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path.exists() and (text := path.read_text()):
            return text
        time.sleep(0.05)
    raise TimeoutError(f"{path} did not come; the folder holds {list(path.parent.iterdir())}")
