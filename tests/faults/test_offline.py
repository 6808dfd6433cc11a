"""Nothing that the project offers asks for an address beyond this machine.

Oracle: the kernel's own counters in a network that holds loopback alone (loopback_only.py), with a
name server that keeps what it is asked. The environment's switches of other libraries
(HF_HUB_OFFLINE) are taken away: a user need not know them.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.rank_farm import free_port
from tests.small_run import SETTINGS

ROOT = Path(__file__).resolve().parents[2]
OWN_NETWORK = ["unshare", "--user", "--map-root-user", "--net", "--mount"]
STEPS = ["batch.global_pairs=8", "train.max_steps=3", "train.log_steps=1", "run.threads=1"]
STEPS += ["loss.category.prototypes=8"]
# torch's TCPStore asks what the loopback address is called, for its log alone; no setting stops it
OWN_NAME = "1.0.0.127.in-addr.arpa"
ASKING = "import socket; socket.create_connection(('192.0.2.7', 80))"
NAMING = "import socket; socket.getaddrinfo('example.org', 80)"


def alone(folder: Path, commands: list[list[str]]) -> list[dict[str, Any]]:
    """What each command came to in a network of its own; skips where no such one can be made."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare (util-linux) to make a network with")
    (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    (folder / "hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()}\n")
    mounts = " && ".join(
        f"mount --bind {folder / name} /etc/{name}" for name in ("resolv.conf", "hosts")
    )
    enter = [*OWN_NETWORK, "sh", "-c", f'{mounts} && exec "$@"', "sh"]
    if (tried := subprocess.run([*enter, "true"], capture_output=True, text=True)).returncode:
        pytest.skip(f"no network of one's own here: {tried.stderr.strip()}")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS"))}
    environment |= {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    script = str(Path(__file__).with_name("loopback_only.py"))
    ended = subprocess.run(
        [*enter, sys.executable, script, json.dumps(commands)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(lines) == len(commands), ended.stderr[-2000:]
    return lines


def settings(folder: Path) -> list[str]:
    return [
        *SETTINGS,
        *STEPS,
        f"run.dir={folder / 'run'}",
        f"data.manifest={folder}/data/manifest.csv",
    ]


def require_quiet(commands: list[list[str]], lines: list[dict[str, Any]]) -> None:
    for command, line in zip(commands, lines, strict=True):
        assert line["code"] == 0, f"{command}\n{line['end']}"
        assert line["attempts"] == 0, command
        assert set(line["asked"]) <= {OWN_NAME}, command


def test_what_leaves_the_machine_is_counted(tmp_path: Path) -> None:
    """The measure itself: a connection, a name that is asked for, and neither."""
    python = [sys.executable, "-c"]
    counted = alone(tmp_path, [[*python, ASKING], [*python, NAMING], [*python, "pass"]])
    assert [line["code"] for line in counted] == [1, 1, 0]
    assert [line["attempts"] for line in counted] == [1, 0, 0]
    assert [line["asked"] for line in counted] == [[], ["example.org"], []]


def test_a_training_reaches_nothing_beyond_this_machine(tmp_path: Path) -> None:
    commands = [[sys.executable, "train.py", *settings(tmp_path)]]
    require_quiet(commands, alone(tmp_path, commands))


@pytest.mark.long
def test_the_launcher_and_every_command_reach_nothing_beyond(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    mlip = [sys.executable, "-m", "mlip.cli"]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"]
    of_run = [f"checkpoint={run}", *settings(tmp_path)]
    prepare = ["prepare", "manifest", "--root", str(data), "--out", f"{tmp_path}/out"]
    ground = [*mlip, "ground", "--checkpoint", str(run), "--out", f"{tmp_path}/map.png"]
    commands = [
        [*launcher, "--master_port", str(free_port()), "train.py", *settings(tmp_path)],
        [*mlip, "evaluate", *of_run, "--out", f"{tmp_path}/again"],
        [*mlip, "embed", *of_run, "--split", "test", "--out", f"{tmp_path}/embeddings"],
        [*mlip, "export", *of_run, "--out", f"{tmp_path}/export", "--onnx"],
        [*mlip, *prepare, "--workers", "1"],
        ["sh", "-c", f'exec "$0" "$@" $(ls {data}/images/test/* | head -1) effusion', *ground],
        [*mlip, "doctor"],
    ]
    lines = alone(tmp_path, commands)
    record_property("commands", len(lines))
    record_property("attempts", sum(line["attempts"] for line in lines))
    require_quiet(commands, lines)
