"""Addresses as people write them: HOST:PORT."""

from __future__ import annotations

from engine.errors import ConfigError


def is_host_port(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) <= 65535


def require_host_port(flag: str, text: str) -> str:
    """`text`, if it is an address. Raises ConfigError naming the flag."""
    if not is_host_port(text):
        raise ConfigError(f"{flag}: got {text!r}, expected HOST:PORT with a port in [1, 65535]")
    return text
