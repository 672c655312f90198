"""Several hosts on one machine: network namespaces on a bridge, whose links can be cut, slowed and mended.

A host here has an address, an interface and a network stack of its own; files, memory and clock are the machine's.
Killing all that runs in a namespace is what the others see of a process that died; a cut link is what they see of a
host that lost its power: packets go nowhere, and nothing says so. Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from tests.support.processes import ROOT

INTERFACE = "link0"  # the link's name in each namespace
_serial = itertools.count()


@dataclass(frozen=True, slots=True)
class NetworkHost:
    """One host of a network."""

    namespace: str
    address: str  # IPv4
    switch_port: str  # its end of the link, in the namespace of the switch
    switch: str  # namespace of the switch

    def start(self, command: Sequence[str], log: IO[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
        """Starts a command on this host."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *command],
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def kill(self) -> None:
        """Kills everything that runs on this host, with SIGKILL."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False)
        for number in listed.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(number), signal.SIGKILL)

    def cut(self) -> None:
        """Cuts the link: what is sent is lost, and the interface still looks up from inside."""
        _run(*f"ip -n {self.switch} link set {self.switch_port} nomaster".split())

    def slow(self, rate: str) -> None:
        """Limits both directions of the link to `rate`, as tc writes it."""
        limit = f"root tbf rate {rate} burst 64kb latency 200ms".split()
        _run("tc", "-n", self.switch, "qdisc", "replace", "dev", self.switch_port, *limit)
        _run("tc", "-n", self.namespace, "qdisc", "replace", "dev", INTERFACE, *limit)

    def mend(self) -> None:
        """Makes a cut or slow link whole."""
        _run(*f"ip -n {self.switch} link set {self.switch_port} master bridge0".split())
        for namespace, interface in ((self.switch, self.switch_port), (self.namespace, INTERFACE)):
            subprocess.run(
                ["tc", "-n", namespace, "qdisc", "del", "dev", interface, "root"], capture_output=True, check=False
            )


@contextlib.contextmanager
def network(count: int) -> Iterator[list[NetworkHost]]:
    """Joins `count` hosts by a switch; kills what runs on them and removes them when the block ends."""
    name = f"asgdn-{os.getpid()}-{next(_serial)}"
    switch = f"{name}-s"
    hosts = [NetworkHost(f"{name}-{i}", f"10.78.0.{i + 1}", f"port{i}", switch) for i in range(count)]
    try:
        _run("ip", "netns", "add", switch)
        _run(*f"ip -n {switch} link add bridge0 type bridge".split())
        _run(*f"ip -n {switch} link set bridge0 up".split())
        for host in hosts:
            _attach(host)
        yield hosts
    finally:
        for host in hosts:
            host.kill()
        for namespace in (*(host.namespace for host in hosts), switch):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def _attach(host: NetworkHost) -> None:
    _run("ip", "netns", "add", host.namespace)
    peer = f"peer name {host.switch_port} netns {host.switch}"
    _run(*f"ip -n {host.namespace} link add {INTERFACE} type veth {peer}".split())
    _run(*f"ip -n {host.switch} link set {host.switch_port} master bridge0 up".split())
    _run(*f"ip -n {host.namespace} address add {host.address}/24 dev {INTERFACE}".split())
    for interface in ("lo", INTERFACE):
        _run(*f"ip -n {host.namespace} link set {interface} up".split())


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
