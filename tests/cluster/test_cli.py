"""The command line without a service: usage, mistakes, exit codes. `tests/e2e` runs it with one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tandem.v1.inference_pb2 import GetStatusResponse, Receipt, WorkerStatus

from cluster.calls import plain
from cluster.cli import run_command
from cluster.client_access import read_access
from cluster.commands.serve import command_to_try
from cluster.security.api_keys import parse_keys

NOBODY = "127.0.0.1:9"


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that must fail as a usage error does; returns the one line that it wrote."""
    assert run_command(arguments) == 2
    out, err = capsys.readouterr()
    # A service says on stdout how far it came.
    assert arguments[0] in ("serve", "gateway") or out == ""
    assert err.startswith("tandem: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("tandem: error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["serv"], "No such command 'serv'"),
        (["serve", "--grpc-prot", "1"], "No such option"),
        (["serve", "--grpc-port", "x"], "Invalid value for '--grpc-port'"),
        (["serve", "--grpc-port", "70000"], "--grpc-port: got 70000, expected: less than or equal to 65535"),
        (["serve", "--decode", "0"], "--decode: got 0"),
        (["serve", "--address", "rai"], "--address: got 'rai', expected: ray, none, auto, or HOST:PORT"),
        (["serve", "--address", "127.0.0.1:9"], "--address 127.0.0.1:9: no Ray cluster there"),
        (["serve", "--config", "/none.yaml"], "/none.yaml: cannot be read: No such file"),
        (["serve", "--model", "/none.gguf"], "model '/none.gguf' not found; known: "),
        (["keys"], "Missing command"),
        (["keys", "new"], "Missing option '--tenant'"),
        (["keys", "new", "--tenant", "a b", "--file", "/tmp/none"], "--tenant: got 'a b', expected a word"),
        (["keys", "new", "--tenant", "a", "--file", "/none/keys"], "/none/keys: cannot be written: No such file"),
        (["status", "--api-key-file", "/none"], "--api-key-file: cannot be read, expected the path of a file"),
        (["status", "--api-key-file", "tandem_0_s3cret"], "--api-key-file: cannot be read, expected the path of a fi"),
        (["generate", "a", "--api-key-file", "/dev/null"], "--api-key-file: the file is empty, expected an API key"),
        (["bench", "--rate", "1", "--api-key-file", "/none"], "--api-key-file: cannot be read, expected the path of"),
        (["generate"], "got neither, expected either TEXT or --file"),
        (["generate", "a", "--file", "b"], "got both, expected either TEXT or --file"),
        (["generate", ""], "TEXT: got '', expected"),
        (["generate", "--chat", "--file", "b"], "--chat goes with TEXT"),
        (["generate", "a", "--model", "m"], "--config and --model go with --local"),
        (["generate", "a", "--max-tokens", "-3"], "sampling_params.max_tokens: got -3, expected an integer in [1, "),
        (["generate", "a", "--temperature", "nan"], "sampling_params.temperature: got nan, expected a number in [0, "),
        (["generate", "a", "--temperature", "-1"], "sampling_params.temperature: got -1.0"),
        (["generate", "a", "--seed", str(1 << 63)], "sampling_params.seed: got 9223372036854775808"),
        (["generate", "--file", "/none.jsonl"], "--file /none.jsonl: cannot be read: No such file"),
        (["generate", "a", "--url", NOBODY], f"--url {NOBODY}: no service answers there: "),
        (["generate", "a", "--url", "here"], "--url: got 'here', expected HOST:PORT"),
        (["generate", "a", "--local", "--model", "/none"], "model '/none' not found"),
        (["status", "--url", NOBODY], f"--url {NOBODY}: no service answers there: "),
        (["status", "--json", "--url", NOBODY], f"--url {NOBODY}: no service answers there: "),
        (["gateway", "--config", "/none.yaml"], "/none.yaml: cannot be read: No such file"),
        (["gateway", "--model", "/none.gguf"], "model '/none.gguf' not found; known: "),
        (["health", "--url", NOBODY], f"--url {NOBODY}: no health from there: "),
        (["health", "--url", "here"], "--url: got 'here', expected HOST:PORT"),
        (["health", "--timeout-s", "0"], "--timeout-s: got 0, expected more than 0"),
        (["health", "--ca", "/none"], "--ca: /none: No such file"),
        (["health", "--certs", "/none"], "/none/ca.crt: No such file"),
        (["health", "--certs", "a", "--ca", "b"], "got both --certs and --ca, expected one"),
        (["worker"], "Missing argument"),
        (["worker", "both", "--gateway", "h:1"], "Invalid value for"),
        (["worker", "decode"], "Missing option '--gateway'"),
        (["worker", "decode", "--gateway", "h"], "--gateway: got 'h', expected HOST:PORT"),
        (["worker", "decode", "--gateway", "h:1", "--port", "-1"], "Invalid value for '--port'"),
        (["worker", "decode", "--gateway", "h:1", "--id", ""], "--id: got '', expected"),
        (["worker", "decode", "--gateway", "10.0.0.1:1"], "--host: got '127.0.0.1', expected the address at which"),
        (["worker", "decode", "--gateway", "h:1", "--host", "[::]"], "--host: got '[::]', expected the address"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, arguments, expected):
    assert expected in fails(capsys, *arguments)


@pytest.mark.parametrize(
    "where",
    [
        ["--gateway", "h:1", "--host", "h2"],
        ["--gateway", "[::1]:1"],
        # Who holds its lifeline is on its machine, whatever the gateway's address.
        ["--gateway", "10.0.0.1:1", "--lifeline"],
    ],
    ids=" ".join,
)
def test_workers_that_others_reach(where: list[str]):
    """In a process of its own, which a worker's watchdog may end."""
    command = [sys.executable, "-m", "cluster.cli", "worker", "decode", *where, "--model", "/none"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as worker:
        assert worker.wait(60) == 2
        assert worker.stderr is not None
        assert "model '/none' not found" in worker.stderr.read()


def test_a_bad_line_is_found_before_anything_is_sent(capsys, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n{"prompt": 3}\n')
    assert fails(capsys, "generate", "--file", str(path), "--url", NOBODY).startswith(f"{path}:2: prompt: got 3")


def test_a_failed_request_is_a_line_of_json_too(capsys):
    assert run_command(["generate", "a", "--json", "--url", NOBODY]) == 2
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert answer["id"] == "0"
    assert answer["error"]["type"] == "ConfigError"
    assert err.count("\n") == 1


def test_bad_environment(capsys, monkeypatch):
    monkeypatch.setenv("TANDEM_LOG_LEVEL", "loud")
    assert "TANDEM_LOG_LEVEL: got 'loud'" in fails(capsys, "status")


def test_version_and_help(capsys):
    assert run_command(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tandem 0.")
    for arguments in ([], ["--help"]):
        assert run_command(arguments) == 0
        assert "generate" in capsys.readouterr().out


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from cluster.cli import run_command; run_command(['--help']); "
        "print(sorted({'torch', 'ray', 'grpc', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "[]"


def test_command_to_try():
    assert "--url" not in command_to_try("127.0.0.1:50051", has_chat=False)
    command = command_to_try("127.0.0.1:1234", has_chat=True)
    assert "generate 'What is the capital of France?' --chat --url 127.0.0.1:1234" in command
    assert "--api-key-file" not in command
    assert " --api-key-file KEY " in command_to_try("127.0.0.1:1234", has_chat=True, needs_key=True)


def test_plain_keeps_defaults_and_large_numbers():
    worker = WorkerStatus(worker_id="p", incarnation=1 << 60)
    status = plain(GetStatusResponse(workers=[worker]))
    assert status["workers"][0]["incarnation"] == 1 << 60
    assert status["workers"][0]["fresh"] is False
    assert status["requests_running"] == 0
    assert set(plain(Receipt())) == {field.name for field in Receipt.DESCRIPTOR.fields}


def test_a_new_key_is_printed_once_and_its_hash_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys"
    assert run_command(["keys", "new", "--tenant", "acme", "--file", str(file)]) == 0
    out, err = capsys.readouterr()
    key = out.removesuffix("\n")
    assert err == ""
    assert key not in file.read_text()
    assert parse_keys(file.read_text(), "keys").tenant_of(key) == "acme"


def test_keys_are_made_as_the_page_says(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
    lines = re.findall(r"^tandem keys .*$", page, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        command = line.replace("tandem", f"{sys.executable} -m cluster.cli", 1)
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    keys = parse_keys((tmp_path / "keys").read_text(), "keys")
    for tenant in ("acme", "ops"):
        assert keys.tenant_of((tmp_path / f"{tenant}.key").read_text().strip()) == tenant


def test_a_key_is_a_files_or_the_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TANDEM_API_KEY", raising=False)
    assert read_access(None, None, NOBODY).api_key == ""
    monkeypatch.setenv("TANDEM_API_KEY", "of-the-environment")
    (tmp_path / "key").write_text("of-the-file\n")
    assert read_access(None, None, NOBODY).api_key == "of-the-environment"
    assert read_access(tmp_path / "key", None, NOBODY).api_key == "of-the-file"


@pytest.mark.parametrize("url", ["10.0.0.1:50051", "gateway.example:50051", "[2001:db8::1]:50051", "127.0.0.1.evil:1"])
def test_a_key_does_not_leave_the_machine_in_clear(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("TANDEM_API_KEY", "the-key")
    said = fails(capsys, "status", "--url", url)
    assert said == f"TANDEM_API_KEY: the key would go to {url} in clear, and others could read it on its way"


def test_shells_complete_commands() -> None:
    asked = {"_TANDEM_COMPLETE": "complete_bash", "COMP_WORDS": "tandem ser", "COMP_CWORD": "1"}
    program = "import sys; sys.argv[0] = 'tandem'; from cluster.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **asked}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["serve"]


def test_help_has_examples_that_can_be_parsed(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("serve", "generate", "worker"):
        assert run_command([command, "--help"]) == 0
        said = capsys.readouterr().out
        examples = [line.split() for line in said.partition("Examples:")[2].splitlines() if line.strip()]
        assert examples
        assert all(words[:2] == ["tandem", command] for words in examples), "none is wrapped"
        flags = {word for words in examples for word in words if word.startswith("--")}
        assert flags <= set(re.findall(r"--[a-z-]+", said.partition("Examples:")[0]))
