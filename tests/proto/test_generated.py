"""The stubs in the repository are what their .proto files give."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROTO = Path(__file__).parents[2] / "proto"


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("stubs")
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run(["bash", PROTO / "generate.sh", out], check=True, env=environment, timeout=60)
    return out / "tandem" / "v1"


def test_stubs_are_up_to_date(generated):
    fresh = {path.name: path.read_text() for path in generated.iterdir()}
    here = {path.name: path.read_text() for path in (PROTO / "tandem" / "v1").glob("*_pb2*")}
    assert fresh.keys() == here.keys()
    stale = [name for name in fresh if fresh[name] != here[name]]
    assert not stale, f"run proto/generate.sh: {stale}"


def test_every_proto_file_is_generated(generated):
    stems = {path.stem for path in (PROTO / "tandem" / "v1").glob("*.proto")}
    assert {path.name for path in generated.glob("*_pb2.py")} == {f"{stem}_pb2.py" for stem in stems}
