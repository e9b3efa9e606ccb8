"""The link between two network namespaces: it carries, loses, goes down and comes back. Needs root, as it does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.lossy_link import NEAR, namespaces


def has_namespaces() -> bool:
    """Root in a container mostly may not."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc") or not Path("/dev/net/tun").exists():
        return False
    try:
        with namespaces():
            return True
    except subprocess.CalledProcessError:
        return False


pytestmark = pytest.mark.skipif(not has_namespaces(), reason="needs ip, tc, /dev/net/tun and the right to use them")

# Asks a server on the far side; each answer needs a packet to come through either way.
SCRIPT = """
import asyncio, random, sys
from bench.lossy_link import FAR, FAR_ADDRESS, Quality, open_link, set_up

SERVER = "import socket; s = socket.create_server(('%s', 5000)); c = s.accept()[0]\\nwhile d := c.recv(9): c.sendall(d)"

async def answers(reader, writer, within_s):
    writer.write(b"x")
    try:
        async with asyncio.timeout(within_s):
            return await reader.readexactly(1) == b"x"
    except TimeoutError:
        return False

async def main():
    with open_link(random.Random(0)) as link:
        command = ["ip", "netns", "exec", FAR, sys.executable, "-c", SERVER % FAR_ADDRESS]
        server = await asyncio.create_subprocess_exec(*command)
        while True:
            try:
                reader, writer = await asyncio.open_connection(FAR_ADDRESS, 5000)
                break
            except ConnectionRefusedError:
                await asyncio.sleep(0.05)
        assert await answers(reader, writer, 5.0)
        link.set(Quality(delay_s=0.2))
        assert not await answers(reader, writer, 0.3)
        assert await reader.readexactly(1) == b"x"
        link.set(Quality(loss=1.0))
        assert not await answers(reader, writer, 0.5)
        link.set(Quality())
        assert await reader.readexactly(1) == b"x", "TCP sends again what was lost"
        set_up(FAR, False)
        assert not await answers(reader, writer, 0.5)
        set_up(FAR, True)
        assert await reader.readexactly(1) == b"x"
        writer.close()
        await server.wait()

asyncio.run(main())
"""


def test_a_link_loses_delays_and_goes_down() -> None:
    with namespaces():
        result = subprocess.run(
            ["ip", "netns", "exec", NEAR, sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60
        )
    assert result.returncode == 0, result.stderr
    assert NEAR not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
