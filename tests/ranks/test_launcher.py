"""The interface that ranks of several hosts meet over."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from mlip.ranks import launcher


def _nodes(monkeypatch: pytest.MonkeyPatch, own: str | None, towards: str | None) -> None:
    """This host as one of two: what its name leads to, and its address towards rank 0's."""

    def look_up(name: str, port: Any, **_: Any) -> list[Any]:
        found = own if name == socket.gethostname() else name
        if found is None:
            raise socket.gaierror
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (found, port))]

    monkeypatch.setattr(launcher.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(launcher, "_own_address_towards", lambda _: towards)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that what is set is undone
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("MASTER_ADDR", "first")
    addresses = {"lo": "127.0.0.1", "eth0": "10.0.0.7", "ib0": "10.1.0.7"}
    entries = {n: [SimpleNamespace(family=socket.AF_INET, address=a)] for n, a in addresses.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: entries)
    states = {n: SimpleNamespace(isup=n != "ib0") for n in addresses}
    monkeypatch.setattr(psutil, "net_if_stats", lambda: states)


@pytest.mark.parametrize(
    ("own", "towards", "is_one_host", "taken"),
    [
        ("127.0.1.1", "10.1.0.7", False, "ib0"),
        ("127.0.1.1", "10.0.0.7", True, "eth0"),  # ranks set by hand, of one host as it seems
        (None, "10.1.0.7", False, "ib0"),
        ("127.0.1.1", "127.0.1.1", False, "eth0"),  # rank 0's own name is that of its loopback
        ("127.0.1.1", None, False, "eth0"),
        ("127.0.1.1", "127.0.0.1", True, None),
        ("127.0.1.1", "10.9.0.7", False, None),
        ("10.0.0.7", "10.1.0.7", False, None),  # gloo finds it
    ],
)
def test_a_host_whose_name_leads_to_its_loopback_is_reached_by_its_network(
    own, towards, is_one_host, taken, monkeypatch
):
    """As Debian and Ubuntu write /etc/hosts: ranks of two hosts never met."""
    _nodes(monkeypatch, own, towards)
    launcher.name_interface(is_one_host)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == taken


def test_an_interface_that_is_named_stays_and_one_of_several_is_not_guessed(monkeypatch):
    _nodes(monkeypatch, "127.0.1.1", "127.0.1.1")
    states = {n: SimpleNamespace(isup=True) for n in ("lo", "eth0", "ib0")}
    monkeypatch.setattr(psutil, "net_if_stats", lambda: states)
    launcher.name_interface(is_one_host=False)
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "bond0")
    monkeypatch.setattr(launcher, "_own_address_towards", lambda _: "10.0.0.7")
    launcher.name_interface(is_one_host=False)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "bond0"


def test_the_own_address_towards_another_is_the_systems():
    assert launcher._own_address_towards("127.0.0.1") == "127.0.0.1"
    assert launcher._own_address_towards("no.such.name.invalid") is None
