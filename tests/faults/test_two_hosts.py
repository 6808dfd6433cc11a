"""Ranks on two hosts: network namespaces joined by a link, with names and /etc/hosts of their own.

Oracle: as many ranks on one host.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import jobs
from tests.rank_farm import free_port

ROOT = Path(__file__).resolve().parents[2]
ENTER = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--uts"]
# $1 the folder of the hosts files, then the command of each rank; ends with the codes of both
HOSTS = """
set -e
folder=$1; shift
(
  exec unshare --net --mount --uts sh -ec '
    folder=$1; shift
    hostname second; mount --bind $folder/hosts-second /etc/hosts
    until ip link set second up 2>/dev/null; do sleep 0.1; done
    ip link set lo up; ip addr add 10.77.0.2/24 dev second
    RANK=1 exec "$@"' sh $folder "$@"
) & second=$!
hostname first; mount --bind $folder/hosts-first /etc/hosts; ip link set lo up
ip link add first type veth peer name second
until [ $(readlink /proc/$second/ns/net) != $(readlink /proc/$$/ns/net) ]; do sleep 0.1; done
ip link set second netns $second
ip addr add 10.77.0.1/24 dev first; ip link set first up
RANK=0 "$@" & first=$!
code=0; wait $first || code=$?
other=0; wait $second || other=$?
echo codes $code $other
"""


def on_two_hosts(folder: Path, *settings: str, master: str) -> tuple[str, str]:
    """The ranks' exit codes, and all that they said; skips where no hosts can be made."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("no unshare (util-linux) and ip (iproute2) to make two hosts with")
    if (tried := subprocess.run([*ENTER, "true"], capture_output=True, text=True)).returncode:
        pytest.skip(f"no network of one's own here: {tried.stderr.strip()}")
    rank = [sys.executable, str(ROOT / "tests/training/toy_run.py"), *settings]
    place = {"MASTER_ADDR": master, "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    place |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*ENTER, "sh", "-c", HOSTS, "sh", str(folder), *rank],
        env=os.environ | place | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.stdout.splitlines(), ended.stderr
    return ended.stdout.splitlines()[-1], ended.stdout + ended.stderr


@pytest.mark.long
@pytest.mark.parametrize("master", ["first", "10.77.0.1"])
def test_two_hosts_whose_names_lead_to_their_loopback_train_as_one(master, tmp_path):
    """As Debian and Ubuntu write /etc/hosts."""
    known = {"first": "127.0.1.1 first\n10.77.0.2 second", "second": "127.0.1.1 second"}
    known["second"] += "\n10.77.0.1 first"
    for host, lines in known.items():
        (tmp_path / f"hosts-{host}").write_text(f"127.0.0.1 localhost\n{lines}\n")
    settings = [f"train.max_steps={jobs.STEPS}", f"train.checkpoint_steps={jobs.EVERY}"]
    settings += ["train.zero_stage=2", "run.timeout_s=20", "train.keep_checkpoints=2"]
    codes, said = on_two_hosts(tmp_path, *settings, f"run.dir={tmp_path / 'two'}", master=master)
    assert codes == "codes 0 0", said
    jobs.finish(tmp_path / "one")
    jobs.require_same_end(tmp_path / "one", tmp_path / "two")
