"""Two hosts on one machine: two network namespaces joined by a veth pair, with real counters of the bytes sent.

Loopback has no counters of one process's own and no speed of a network. Here each rank has a network stack of its own,
so everything it sends crosses one link, the kernel counts it (headers, acknowledgements and retransmissions included),
and ``tc tbf`` can limit the link's rate. Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.processes import start_ranks

INTERFACE = "link0"  # the veth's name in both namespaces
_COUNTER = Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes")
_serial = itertools.count()


@dataclass(frozen=True, slots=True)
class Host:
    """One end of the link."""

    namespace: str
    address: str  # IPv4


def why_not() -> str | None:
    """Why this machine cannot have two hosts, as a sentence; None when it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "network namespaces need the ip and tc commands (iproute2)"
    try:
        with two_hosts():
            return None
    except subprocess.CalledProcessError as error:
        return f"this kernel refuses network namespaces or veth pairs: {error.stderr.strip()}"


@contextlib.contextmanager
def two_hosts(rate: str | None = None) -> Iterator[tuple[Host, Host]]:
    """Two hosts joined by a link of ``rate`` ("1gbit", "200mbit"; None: as fast as the machine) in each direction.

    Names are unique to the call; the namespaces, and the link with them, are gone when the block ends.
    """
    name = f"asgd-{os.getpid()}-{next(_serial)}"
    hosts = Host(f"{name}a", "10.77.0.1"), Host(f"{name}b", "10.77.0.2")
    try:
        for host in hosts:
            _run("ip", "netns", "add", host.namespace)
            # IPv6 would send neighbour and router solicitations of its own
            _inside(host, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6")
        first, second = (host.namespace for host in hosts)
        _run(*f"ip -n {first} link add {INTERFACE} type veth peer name {INTERFACE} netns {second}".split())
        for host in hosts:
            _configure(host, rate)
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)


def namespaces() -> set[str]:
    """The names of this machine's network namespaces."""
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line}


def _configure(host: Host, rate: str | None) -> None:
    _run(*f"ip -n {host.namespace} address add {host.address}/30 dev {INTERFACE}".split())
    for interface in ("lo", INTERFACE):
        _run(*f"ip -n {host.namespace} link set {interface} up".split())
    if rate is not None:
        # burst: above one 64 KiB segment, else tbf cuts each up on the CPU; latency: how long a queue may get
        qdisc = f"tbf rate {rate} burst 256kb latency 200ms"
        _run(*f"tc -n {host.namespace} qdisc add dev {INTERFACE} root {qdisc}".split())


def run_on_hosts(
    hosts: Sequence[Host], module: str, arguments: Sequence[str] = (), *, timeout: float = 600.0
) -> list[dict[str, Any]]:
    """Run ``python -m module arguments`` as one rank on each host; return what the ranks gave to ``report``."""
    environment = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": INTERFACE}
    prefixes = [["ip", "netns", "exec", host.namespace] for host in hosts]
    return start_ranks(module, arguments, prefixes=prefixes, environment=environment, timeout=timeout)


def sent_bytes() -> int:
    """Bytes this host has sent over the link so far, headers included. Call it on a host."""
    return int(_COUNTER.read_text())


def settled_sent_bytes(quiet: float = 0.2) -> int:
    """``sent_bytes()`` once the counter has stood still for ``quiet`` seconds: what was under way has been counted."""
    last, since = sent_bytes(), time.monotonic()
    while time.monotonic() - since < quiet:
        time.sleep(0.01)
        now = sent_bytes()
        if now != last:
            last, since = now, time.monotonic()
    return last


def _inside(host: Host, *command: str) -> None:
    _run("ip", "netns", "exec", host.namespace, *command)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
