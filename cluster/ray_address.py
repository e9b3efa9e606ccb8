"""Whether anything listens where a Ray cluster is said to be. Knows nothing of Ray itself."""

from __future__ import annotations

import asyncio

from engine.errors import ConfigError

CONNECT_TIMEOUT_S = 5.0


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
