"""The variables by which a launcher tells a process its place: whole, of one world, and with a GPU;
and the network interface by which other hosts reach it.

What does not live here: joining the ranks' group (process_group.start).
"""

from __future__ import annotations

import ipaddress
import os
import socket

import torch

# what starts several processes without a RANK for torch -> how many it says that it has started;
# srun: of this step, not of the job, whose batch script is one process
_TASKS = {
    "srun": "SLURM_STEP_NUM_TASKS",
    "mpirun": "OMPI_COMM_WORLD_SIZE",
    "an MPI launcher": "PMI_SIZE",
    "a launcher": "WORLD_SIZE",
}


def require_launcher() -> None:
    """Raises:  ValueError where RANK is there, of a shell or a job script, without all the rest."""
    names = ("RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
    given = {name: os.environ.get(name, "") for name in names}
    given["LOCAL_RANK"] = os.environ.get("LOCAL_RANK", "0")
    for name, value in given.items():
        if not (value if name == "MASTER_ADDR" else value.isdecimal()):
            raise ValueError(
                f"RANK is set, as a launcher does, but {name} is {value!r}: start the ranks by "
                "torchrun or deepspeed, or for one process `unset RANK`"
            )
    if int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        raise ValueError(
            f"RANK={given['RANK']} with WORLD_SIZE={given['WORLD_SIZE']}: expected ranks from 0 to "
            "one less than WORLD_SIZE; start them by torchrun or deepspeed, or for one process "
            "`unset RANK`"
        )


def require_gpu(index: int) -> None:
    """Raises:  ValueError for a task that was given one GPU and counts as the third of its node,
    and for one that sees several and does not know which is its own: all would take the first.
    """
    found = torch.cuda.device_count()
    knows_its_own = "LOCAL_RANK" in os.environ or "RANK" not in os.environ
    if not knows_its_own and found > 1 and int(os.environ["WORLD_SIZE"]) > 1:
        raise ValueError(
            f"RANK is set and LOCAL_RANK is not, and this process sees {found} GPUs: expected the "
            "number of its GPU. Start the ranks by torchrun or deepspeed, or export "
            "LOCAL_RANK=$SLURM_LOCALID (srun), LOCAL_RANK=$OMPI_COMM_WORLD_LOCAL_RANK (mpirun), or "
            "LOCAL_RANK=0 where a node has one rank"
        )
    if index >= found:
        raise ValueError(
            f"LOCAL_RANK={index}, and this process sees {found} GPU(s): the GPU that it takes "
            "is that of its LOCAL_RANK. Start as many ranks on a node as it has GPUs, let each see "
            "all of them (CUDA_VISIBLE_DEVICES, no --gpus-per-task), or set LOCAL_RANK=0 where "
            "each sees its own alone"
        )


def require_one_task() -> None:
    """Raises:  ValueError where `srun python train.py` or the like has started several processes.

    One of them would hold run.dir and train alone, on one GPU, and the others would be refused.
    """
    for launcher, name in _TASKS.items():
        tasks = os.environ.get(name, "")
        if tasks.isdecimal() and int(tasks) > 1:
            raise ValueError(
                f"{launcher} has started {tasks} processes ({name}={tasks}) and none has a RANK, "
                "so each would train alone: start one process a node and let it start the ranks, "
                "for example srun --ntasks-per-node 1 torchrun ... train.py ... (docs/"
                f"reliability.md, On a cluster); for runs of their own, unset {name}"
            )


def name_interface(is_one_host: bool) -> None:
    """Set GLOO_SOCKET_IFNAME where this host's own name leads to its loopback, or nowhere.

    Debian and Ubuntu write 127.0.1.1 for it into /etc/hosts, and gloo would tell the other hosts to
    come to that address. Instead: the interface towards MASTER_ADDR; on the host that MASTER_ADDR
    names by such a name, the only one there is.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    address = _own_address_towards(os.environ["MASTER_ADDR"])
    is_far = address is not None and not _is_loopback(address)
    if (is_one_host and not is_far) or not _is_loopback(socket.gethostname()):
        return
    import psutil  # late: mlip.training.grad_cache imports this file where torch is alone

    interfaces = {
        name: {entry.address for entry in entries}
        for name, entries in psutil.net_if_addrs().items()
        if any(e.family == socket.AF_INET and not _is_loopback(e.address) for e in entries)
    }
    if is_far:
        found = [name for name, addresses in interfaces.items() if address in addresses]
    else:
        states = psutil.net_if_stats()
        found = [n for n in interfaces if n in states and states[n].isup]
    if len(found) == 1:
        os.environ["GLOO_SOCKET_IFNAME"] = found[0]


def _is_loopback(name: str) -> bool:
    """Whether a name or address is, by what gloo takes of it: the first; or leads nowhere."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return True
    return ipaddress.ip_address(str(found).split("%")[0]).is_loopback


def _own_address_towards(name: str) -> str | None:
    """Where the system would send from; nothing is sent. None where there is no way."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as way:
            way.connect(place)
            return str(way.getsockname()[0])
    except OSError:
        return None
