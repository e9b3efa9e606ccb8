"""A service whose parts somebody else starts, as on Kubernetes: a gateway alone, workers that report to it, and the
question after their health, with certificates everywhere."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from cluster.security.certs import make_certs
from tests.e2e.service import CONFIG, START_S, STOP_S, TANDEM, error_of, eventually, tandem
from tests.golden.default_model import require_default_model

pytestmark = [pytest.mark.model]
HOST = "127.0.0.1"


@contextmanager
def started(log: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command that runs until the context is left."""
    with log.open("w") as output:
        process = subprocess.Popen([*TANDEM, *arguments], stdout=output, stderr=subprocess.STDOUT, text=True)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_S)


def found(log: Path, pattern: str) -> str:
    """What a line of the log says, once it is there."""
    eventually(lambda: re.search(pattern, log.read_text(), re.MULTILINE), START_S)
    match = re.search(pattern, log.read_text(), re.MULTILINE)
    assert match is not None
    return match[1]


def test_a_gateway_and_workers_of_their_own(tmp_path: Path) -> None:
    require_default_model()
    gateway_certs, worker_certs, client_certs = make_certs(tmp_path / "certs", ["localhost", HOST], days=1)
    folders = f"gateway_certs: {gateway_certs}, worker_certs: {worker_certs}, client_certs: {client_certs}"
    config = tmp_path / "tandem.yaml"
    config.write_text(f"{CONFIG}security: {{{folders}}}\nlogging: {{format: json, level: info}}\n")
    ca = ("--ca", str(client_certs / "ca.crt"))
    with ExitStack() as stack:
        log = tmp_path / "gateway.log"
        gateway = stack.enter_context(started(log, "gateway", "--config", str(config)))
        reports_to = found(log, r"^workers report to (\S+)$")
        url = found(log, r"^gateway for \S+ at (\S+)$")

        def health(*arguments: str) -> subprocess.CompletedProcess[str]:
            return tandem("health", "--url", url, *arguments)

        assert health(*ca, "--service", "liveness").stdout == "SERVING\n"
        assert error_of(health(*ca)) == f"--url {url}: the process is NOT_SERVING"
        assert error_of(health(*ca, "--service", "x")).startswith("--service: got 'x', expected one that is served")
        assert error_of(health()).startswith(f"--url {url}: no health from there: ")
        assert "expected one" in error_of(health(*ca, "--certs", str(worker_certs)))

        addresses = {}
        for role in ("prefill", "decode"):
            arguments = ("worker", role, "--gateway", reports_to, "--id", f"{role}-x", "--config", str(config))
            stack.enter_context(started(tmp_path / f"{role}.log", *arguments))
            addresses[role] = found(tmp_path / f"{role}.log", r"^at (\S+)$")
        eventually(lambda: health(*ca).returncode == 0, START_S)
        for address in addresses.values():
            asked = ("health", "--url", address)
            eventually(
                lambda asked=asked: tandem(*asked, "--certs", str(worker_certs)).stdout == "SERVING\n",
                START_S,
            )
            # The port of a worker asks for a worker's certificate, and a probe without one learns nothing.
            error_of(tandem(*asked))
            error_of(tandem(*asked, *ca))

        answer = tandem("generate", "The capital of France is", "--url", url, *ca, "--temperature", "0")
        assert " Paris" in answer.stdout, answer
        gateway.send_signal(signal.SIGTERM)
        assert gateway.wait(STOP_S) == 0
        said = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        assert any(line["logger"] == "tandem.access" for line in said)

        # Another gateway in its place hears from the same workers.
        ports = f"grpc_port: {url.rpartition(':')[2]}, registry_port: {reports_to.rpartition(':')[2]}, http_port: 0"
        config.write_text(config.read_text().replace("grpc_port: 0", ports))
        stack.enter_context(started(tmp_path / "next.log", "gateway", "--config", str(config)))
        eventually(lambda: health(*ca).returncode == 0, START_S)
        asked = ("The capital of France is", "--url", url, *ca, "--temperature", "0", "--max-tokens", "4")
        assert " Paris" in tandem("generate", *asked).stdout
    assert "Traceback" not in "".join(log.read_text() for log in tmp_path.glob("*.log"))
