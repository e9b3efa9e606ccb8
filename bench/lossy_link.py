"""A link between two network namespaces that can lose packets, delay them, and go down. Needs root on Linux.

    with netem in the kernel      near ns │ tandem-near ═══ veth ═══ tandem-far │ far ns     tc netem on both ends
    without                       near ns │ tandem-near ─ TUN ─ here ─ TUN ─ tandem-far │ far ns

Without netem a packet passes through this process, which loses or delays it: TCP at either end is the kernel's own, and
cannot tell the difference.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

NEAR, FAR = "tandem-near", "tandem-far"
NEAR_ADDRESS, FAR_ADDRESS = "10.77.0.1", "10.77.0.2"
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
# As on a veth pair, where TCP hands over segments of up to 64 KiB and netem loses or keeps them whole.
MTU = 65_000
PACKETS_PER_TURN = 64


@dataclass(frozen=True, slots=True)
class Quality:
    """Of either direction. `loss` is a share of all packets."""

    loss: float = 0.0
    delay_s: float = 0.0


class Link(Protocol):
    name: str

    def set(self, quality: Quality) -> None: ...


def ip(*arguments: str, namespace: str = "") -> None:
    """Raises CalledProcessError with what `ip` wrote to stderr."""
    subprocess.run(["ip", *(["-n", namespace] if namespace else []), *arguments], check=True, capture_output=True)


def set_up(namespace: str, is_up: bool) -> None:
    """The link's end in a namespace, up or down."""
    ip("link", "set", namespace, "up" if is_up else "down", namespace=namespace)


@contextmanager
def namespaces() -> Iterator[None]:
    """NEAR and FAR, each with nothing but its own loopback, while the context lasts."""
    try:
        for name in (NEAR, FAR):
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)  # Of a run that was killed.
            ip("netns", "add", name)
            ip("link", "set", "lo", "up", namespace=name)
        yield
    finally:
        for name in (NEAR, FAR):
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)


@contextmanager
def open_link(rng: random.Random) -> Iterator[Link]:
    """A good link. Call inside NEAR; FAR is there. The running loop carries the packets where the kernel does not."""
    with _open_ends(rng) as link:
        for namespace, address in ((NEAR, NEAR_ADDRESS), (FAR, FAR_ADDRESS)):
            ip("address", "add", f"{address}/24", "dev", namespace, namespace=namespace)
            set_up(namespace, True)
        yield link


@contextmanager
def _open_ends(rng: random.Random) -> Iterator[Link]:
    ip("link", "add", NEAR, "type", "veth", "peer", "name", FAR)
    if _netem(NEAR, Quality(), namespace=NEAR):
        ip("link", "set", FAR, "netns", FAR)
        yield VethLink()
        return
    ip("link", "del", NEAR)
    with TunLink(rng) as link:
        yield link


class VethLink:
    """A veth pair with netem at both ends."""

    name = "veth and tc netem"

    def set(self, quality: Quality) -> None:
        for end in (NEAR, FAR):
            assert _netem(end, quality, namespace=end), "it worked before"


def _netem(device: str, quality: Quality, *, namespace: str) -> bool:
    """False where the kernel has no netem."""
    command = ["tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "netem"]
    options = ["loss", f"{quality.loss:.1%}", "delay", f"{quality.delay_s * 1e3:g}ms"]
    result = subprocess.run([*command, *options], check=False, capture_output=True, text=True)
    if result.returncode and "kind is unknown" not in result.stderr:
        raise OSError(f"tc: {result.stderr.strip()}")
    return result.returncode == 0


class TunLink:
    """Two TUN devices, and this process in between."""

    name = "TUN devices (this kernel has no netem)"

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._quality = Quality()
        self._ends: list[int] = []
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> TunLink:
        self._ends = [_open_tun(NEAR), _open_tun(FAR)]
        # The device moves; the file stays here.
        ip("link", "set", FAR, "netns", FAR)
        for namespace in (NEAR, FAR):
            ip("link", "set", namespace, "mtu", str(MTU), namespace=namespace)
        for source, target in (self._ends, self._ends[::-1]):
            self._loop.add_reader(source, self._carry, source, target)
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._ends:
            self._loop.remove_reader(end)
            os.close(end)
        self._ends = []

    def set(self, quality: Quality) -> None:
        self._quality = quality

    def _carry(self, source: int, target: int) -> None:
        for _ in range(PACKETS_PER_TURN):
            try:
                packet = os.read(source, MTU + 1)
            except OSError:
                return  # There is nothing more, or this end is down.
            if self._rng.random() >= self._quality.loss:
                self._loop.call_later(self._quality.delay_s, self._arrive, target, packet)

    def _arrive(self, target: int, packet: bytes) -> None:
        # Lost, where the other end is down or its queue is full.
        if target in self._ends:
            with suppress(OSError):
                os.write(target, packet)


def _open_tun(name: str) -> int:
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return end
