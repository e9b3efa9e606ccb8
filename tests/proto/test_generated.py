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
    return out


def test_stubs_are_up_to_date(generated):
    fresh = {str(path.relative_to(generated)): path.read_text() for path in generated.rglob("*.py*")}
    here = {str(path.relative_to(PROTO)): path.read_text() for path in PROTO.glob("tandem/*/*_pb2*")}
    assert fresh.keys() == here.keys()
    stale = [name for name in fresh if fresh[name] != here[name]]
    assert not stale, f"run proto/generate.sh: {stale}"


def test_every_proto_file_is_generated(generated):
    stems = {path.relative_to(PROTO).with_suffix("") for path in PROTO.rglob("*.proto")}
    assert {str(path.relative_to(generated)) for path in generated.rglob("*_pb2.py")} == {
        f"{stem}_pb2.py" for stem in stems
    }
