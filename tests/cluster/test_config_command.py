"""`tandem config`: what it prints is true of what `serve` takes."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from cluster.cli import run_command
from cluster.commands.config import reference_text
from cluster.config import TandemConfig, known_keys
from cluster.security.api_keys import new_key

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
WRONG = "engine: {blok_size: 3}\ngateway:\n  max_waiting: -1\n  router: {policy: best}\n"


def tandem(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run_command(["config", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_schema_takes_what_the_configuration_takes(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = tandem(capsys, "schema")
    assert code == 0
    schema = json.loads(text)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(json.loads(TandemConfig().model_dump_json()))
    for values in (yaml.safe_load(WRONG), {"cluster": {"grpc_port": 70000}}, {"engines": {}}):
        assert not validator.is_valid(values)
        with pytest.raises(ValidationError):
            TandemConfig.model_validate(values)


def test_the_reference_has_every_key_and_is_what_the_page_says() -> None:
    reference = reference_text()
    sections = {key for key in known_keys() if any(other.startswith(f"{key}.") for other in known_keys())}
    assert [key for key in known_keys() if key not in sections and f"| `{key}` |" not in reference] == []
    assert reference.strip() in PAGE.read_text(), (
        "tandem config reference prints what belongs into docs/configuration.md"
    )


def test_a_file_in_good_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tandem.yaml"
    file.write_text("gateway: {max_running: 3, max_waiting: 1024}\n")
    code, said, _ = tandem(capsys, "check", str(file))
    assert (code, said) == (0, f"{file}: in good order; it sets this:\ngateway:\n  max_running: 3\n")
    file.write_text("")
    assert tandem(capsys, "check", str(file))[1].endswith("nothing but defaults\n")


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tandem.yaml"
    file.write_text(WRONG)
    code, _, errors = tandem(capsys, "check", str(file))
    assert code == 2
    lines = errors.splitlines()
    assert len(lines) == 3
    assert f"tandem: error: {file}:1: engine.blok_size: unknown key, nearest known key: engine.block_size" in lines
    assert any(f"{file}:3: gateway.max_waiting: got -1" in line for line in lines)
    assert any(f"{file}:4: gateway.router.policy: got 'best'" in line for line in lines)


def test_files_that_it_names_are_read_where_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, keys, salt = tmp_path / "tandem.yaml", tmp_path / "keys", tmp_path / "salt"
    file.write_text(
        f"gateway: {{auth: {{keys_file: {keys}, salt_file: {salt}}}}}\ncluster: {{profile: none-such}}\n"
        f"security: {{gateway_certs: {tmp_path}, worker_certs: {tmp_path}}}\n"
    )
    assert tandem(capsys, "check", str(file))[0] == 0
    code, _, errors = tandem(capsys, "check", str(file), "--files")
    assert code == 2
    lines = errors.splitlines()
    assert len(lines) == 5, lines
    for part, text in enumerate([f"{tmp_path}/ca.crt", f"{tmp_path}/ca.crt", str(keys), str(salt), "none-such"]):
        assert text in lines[part]
    new_key("acme", keys)
    salt.write_text("0" * 64)
    file.write_text(f"gateway: {{auth: {{keys_file: {keys}, salt_file: {salt}}}}}\n")
    assert tandem(capsys, "check", str(file), "--files")[0] == 0


def test_no_file_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = tandem(capsys, "check", str(tmp_path / "none"))
    assert code == 2
    assert "cannot be read" in errors
