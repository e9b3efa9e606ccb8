"""Addresses as people write them: HOST:PORT."""

from __future__ import annotations

import ipaddress

from engine.errors import ConfigError

EVERYWHERE = ("0.0.0.0", "[::]", "::")


def is_host_port(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) <= 65535


def require_host_port(flag: str, text: str) -> str:
    """`text`, if it is an address. Raises ConfigError naming the flag."""
    if not is_host_port(text):
        raise ConfigError(f"{flag}: got {text!r}, expected HOST:PORT with a port in [1, 65535]")
    return text


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine for whoever names it. Other names than localhost are not looked up."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def require_reachable(flag: str, host: str, gateway: str) -> None:
    """Raises ConfigError naming the flag where others than this machine could not reach `host`, and `gateway`
    (HOST:PORT), to which it is told, is elsewhere."""
    if (is_loopback(host) or host in EVERYWHERE) and not is_loopback(gateway.rpartition(":")[0]):
        raise ConfigError(f"{flag}: got {host!r}, expected the address at which {gateway} and other workers reach it")
