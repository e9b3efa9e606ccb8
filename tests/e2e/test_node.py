"""The openai package of npm against a real service."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.e2e.foreign import NODE_FOLDER, require_node
from tests.e2e.service import eventually, serving
from tests.golden.default_model import require_default_model

pytestmark = [pytest.mark.model]


def test_openai_package(tmp_path: Path) -> None:
    node = require_node()
    require_default_model()
    with serving(tmp_path, "--address", "none") as served:
        done = subprocess.run(
            [node, "--test", "--test-reporter=spec", "openai.test.mjs"],
            cwd=NODE_FOLDER,
            env={**os.environ, "OPENAI_BASE_URL": served.openai_url},
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "closing streams" in done.stdout
        # The last test has left three answers of 1,200 tokens, which would take longer than this.
        eventually(served.is_idle, 10)
