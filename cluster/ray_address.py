"""Where a Ray cluster is, and whether anything listens there."""

from __future__ import annotations

import asyncio

from ray._private import services

from engine.errors import ConfigError

CONNECT_TIMEOUT_S = 5.0


def find_address(address: str) -> str:
    """HOST:PORT of the cluster that `address` means: itself, or for "auto" what RAY_ADDRESS says, else the one that Ray
    on this machine was last started for. Raises ConfigError. Call in Ray's thread."""
    if address != "auto":
        return address
    try:
        # Private, but ray.init would wait a minute for a head that is gone, and then end the process.
        return str(services.canonicalize_bootstrap_address_or_die(address))
    except (ConnectionError, ValueError) as error:
        raise ConfigError(
            f"--address auto: expected Ray running on this machine, or its HOST:PORT in RAY_ADDRESS: {error}"
        ) from error


async def check_reachable(address: str) -> None:
    """Raises ConfigError at once; Ray itself would retry for a minute and then end the process."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except TimeoutError:
        raise ConfigError(f"--address {address}: nothing answers there within {CONNECT_TIMEOUT_S:g} s") from None
    except OSError as error:
        raise ConfigError(f"--address {address}: no Ray cluster there: {error.strerror or error}") from error
    writer.close()
