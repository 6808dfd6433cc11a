"""Commands in a network of their own with nothing but loopback; prints what tried to leave it.

Run as root of new user, network and mount namespaces (test_offline.py does), with 127.0.0.1 as the
name server: `python loopback_only.py '<json list of commands>'`. One JSON line a command: exit
code, by how much the kernel's counters of packets without a route grew, and the names asked for.
Addresses beyond this machine are counted whoever asks, C++ too, where a hook of Python's would see
Python alone.
"""

from __future__ import annotations

import fcntl
import json
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

_SIOCSIFFLAGS, _IFF_UP = 0x8914, 0x1


def raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", _IFF_UP))


def attempts() -> int:
    """Packets and connections that found no route, of this network since it was made."""
    names, values = (
        line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if "Ip:" in line
    )
    six = dict(line.split() for line in Path("/proc/net/snmp6").read_text().splitlines())
    return int(values[names.index("OutNoRoutes")]) + int(six["Ip6OutNoRoutes"])


class NameServer(threading.Thread):
    """Knows no name, and keeps those that it is asked for."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.asked: list[str] = []
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 53))
        self.start()

    def run(self) -> None:
        while True:
            question, sender = self.socket.recvfrom(4096)
            labels, place = [], 12  # behind the header (RFC 1035, 4.1)
            while length := question[place]:
                labels.append(question[place + 1 : place + 1 + length].decode())
                place += length + 1
            self.asked.append(".".join(labels))
            # an answer of the same id: no such name
            answer = (
                question[:2] + b"\x81\x83" + question[4:6] + bytes(6) + question[12 : place + 5]
            )
            self.socket.sendto(answer, sender)


def main() -> None:
    raise_loopback()
    server = NameServer()
    for command in json.loads(sys.argv[1]):
        before = attempts()
        server.asked.clear()
        ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
        line = {
            "code": ended.returncode,
            "attempts": attempts() - before,
            "asked": sorted(set(server.asked)),
            "end": (ended.stdout + ended.stderr)[-2000:],
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
