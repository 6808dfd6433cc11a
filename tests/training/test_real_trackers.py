"""W&B and MLflow as they are installed: what their files hold after a kill -9 and a resume.

The stand-ins of test_trackers.py are held to what is seen here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLACE = "/mnt/st-elsewhere/cardiology"


def _needs(*modules: str) -> pytest.MarkDecorator:
    lacking = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(lacking), reason=f"{', '.join(lacking)} not installed")


@pytest.fixture
def asked() -> Iterator[tuple[int, list[bytes]]]:
    """A proxy's port, and what was asked of it.

    MLflow's reports of its use would go through it; those of W&B's process do not (a tracer of
    system calls sees them): that they are switched off is tested in test_trackers.py.
    """
    server = socket.create_server(("127.0.0.1", 0))
    heard: list[bytes] = []

    def listen() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                heard.append(connection.recv(200))

    threading.Thread(target=listen, daemon=True).start()
    yield server.getsockname()[1], heard
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def _run(folder: Path, port: int, start: int, last: int, end: str, *settings: str) -> None:
    environment = {
        key: value
        for key, value in os.environ.items()
        # these tell MLflow that it is tested, and it sends nothing
        if not key.startswith(("WANDB_", "MLFLOW_", "PYTEST_")) and key not in ("CI", "NO_PROXY")
    }
    proxy = f"http://127.0.0.1:{port}"
    environment |= {name: proxy for name in ("HTTP_PROXY", "HTTPS_PROXY", "https_proxy")}
    temporary = folder.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    environment["TMPDIR"] = str(temporary)
    done = subprocess.run(
        [
            *(sys.executable, "tests/training/tracked_run.py", str(folder)),
            *(str(start), str(last), end, f"data.manifest={PLACE}/films.csv", *settings),
        ],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == (-9 if end == "kill" else 0), done.stderr[-3000:]
    assert not list(temporary.iterdir())


def _killed_and_resumed(folder: Path, port: int, setting: str) -> None:
    """Six steps, a kill, and from the checkpoint of the fourth to the eighth."""
    folder.mkdir()
    _run(folder, port, 0, 6, "kill", setting)
    _run(folder, port, 4, 8, "trained", setting, "train.log_steps=7")
    logged = [json.loads(line)["step"] for line in (folder / "log.jsonl").open()]
    assert logged == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]


def _require_no_places(folder: Path) -> None:
    """In no file; but the run's own folder may be named, in those that stay there."""
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"elsewhere" not in content and b"words on the terminal" not in content, path


def _wandb_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a run's file: records in LevelDB's log format, blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    content, at, part = path.read_bytes(), 7, b""
    rows = []
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        part += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record = wandb_internal_pb2.Record.FromString(part)
            part = b""
            if record.HasField("history"):
                items = record.history.item
                rows.append({(i.key or i.nested_key[0]): json.loads(i.value_json) for i in items})
    return rows


@pytest.mark.long
@_needs("wandb")
def test_wandbs_files_hold_each_step_once_and_nothing_of_the_machine(
    tmp_path: Path, asked: Any
) -> None:
    port, heard = asked
    folder = tmp_path / "mine"
    _killed_and_resumed(folder, port, "train.wandb=true")
    first, second = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert first.name == second.name  # one run
    rows = [*_wandb_rows(first), *_wandb_rows(second)]
    assert [row["step"] for row in rows if "total" in row] == list(range(1, 9))
    assert [row["step"] for row in rows if "val/total" in row] == [4, 8]
    assert rows[0]["terms/own"] == 1.0 and rows[0]["scales/logit"] == 14.0
    assert rows[4]["val/recall@10 image to text"] == 0.5
    _require_no_places(folder)
    for path in (first, second):
        content = path.read_bytes()
        assert b"films.csv" in content and b'"log_steps":' in content
        for told in (str(tmp_path), str(ROOT), sys.executable, "tracked_run", "psutil"):
            assert told.encode() not in content
        assert not [p for p in (path.parent / "files").rglob("*") if "output" in p.name]
    assert heard == []


@pytest.mark.long
@_needs("mlflow", "sqlalchemy", "alembic")
def test_mlflows_store_holds_each_step_once_in_one_run(tmp_path: Path, asked: Any) -> None:
    port, heard = asked
    folder = tmp_path / "lr=0.1 of mine"
    _killed_and_resumed(folder, port, "train.mlflow=true")
    code = (
        "import json, sys\nfrom mlflow.tracking import MlflowClient\n"
        "client = MlflowClient(tracking_uri=f'sqlite:///{sys.argv[1]}/mlflow.db')\n"
        "(e,) = [e for e in client.search_experiments() if e.name == 'mlip']\n"
        "(run,) = client.search_runs([e.experiment_id])\n"
        "steps = {n: [m.step for m in client.get_metric_history(run.info.run_id, n)]\n"
        "         for n in run.data.metrics}\n"
        "print(json.dumps([run.info.status, run.info.run_name, run.info.user_id, steps,\n"
        "                  run.data.params, run.data.tags]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    status, name, user, steps, params, tags = json.loads(done.stdout.splitlines()[-1])
    assert (status, name, user) == ("FINISHED", "lr=0.1 of mine", "unknown")
    val = {name: each for name, each in steps.items() if name.startswith("val/")}
    assert val == dict.fromkeys(["val/total", "val/recall_at_10 image to text"], [4, 8])
    of_step = {name: each for name, each in steps.items() if name not in val}
    names = ["total", "grad_norm", "lr", "pairs_per_s", "terms/own", "scales/logit"]
    assert of_step == dict.fromkeys(names, list(range(1, 9)))
    assert params["data.manifest"] == "films.csv" and params["train.log_steps"] == "4"
    assert tags == {"mlflow.runName": "lr=0.1 of mine"}
    # no folder of a half-quoted name beside it, and none in the working directory
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, "tmp"}
    assert not (ROOT / "mlruns").exists()
    _require_no_places(folder)
    assert heard == []
