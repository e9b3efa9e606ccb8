"""Clients that are not ours, as the tests find them on this machine."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

NODE_FOLDER = Path(__file__).parents[1] / "node"
NODE_MODULES = NODE_FOLDER / "node_modules"
OLDEST_NODE = 20


def require_node() -> str:
    """The `node` to run. Skips where there is none that will do, or its packages are not installed."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.match(r"v(\d+)", version)
    if match is None or int(match[1]) < OLDEST_NODE:
        pytest.skip(f"node is {version.strip()}, not {OLDEST_NODE} or newer")
    if not NODE_MODULES.exists():
        pytest.skip("Node's packages are not installed: make node-clients")
    return node


def with_grpcurl(folder: Path) -> dict[str, str]:
    """Variables of an environment that has a grpcurl: the machine's own, else one that does what the pages need."""
    if shutil.which("grpcurl") is None:
        command = folder / "grpcurl"
        stand_in = Path(__file__).with_name("grpcurl.py")
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{stand_in}" "$@"\n')
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
        return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    return dict(os.environ)
