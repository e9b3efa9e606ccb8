"""What log lines look like, for people and for machines."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys

import pytest

from cluster.logs.lines import JsonLines, TextLines
from engine.errors import InvalidArgument, NotFound, Unavailable
from engine.log_fields import about, told
from engine.trace_context import read_trace

TRACE = read_trace("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")


@pytest.fixture
def record(caplog: pytest.LogCaptureFixture):
    """One line, as a logger makes it."""

    def make(*arguments: object, **more: object) -> logging.LogRecord:
        with caplog.at_level(logging.INFO):
            logging.getLogger("cluster.failures").info(*arguments, **more)
        return caplog.records[-1]

    return make


def test_text_says_what_it_is_about_behind_the_message(record) -> None:
    line = TextLines().format(record("%s; retry %d", "gone", 1, extra=about("r 1\n", TRACE, tokens=3, tenant="")))
    trace = "trace_id=0af7651916cd43dd8448eb211c80319c"
    assert line == f'INFO cluster.failures: gone; retry 1 request_id="r 1\\n" {trace} tokens=3 tenant=""'
    assert TextLines().format(record("nothing more")) == "INFO cluster.failures: nothing more"
    assert TextLines().format(record("x", extra=about("", None))) == "INFO cluster.failures: x"


def test_json_is_one_object_a_line(record) -> None:
    line = JsonLines("decode-1").format(record("a\n%s", "b", extra=about("r", TRACE, ttft_s=0.5)))
    assert "\n" not in line
    said = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", said.pop("time"))
    assert said == {
        "level": "info",
        "logger": "cluster.failures",
        "message": "a\nb",
        "worker_id": "decode-1",
        "request_id": "r",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "ttft_s": 0.5,
    }
    assert "worker_id" not in json.loads(JsonLines().format(record("of no worker")))


def test_json_holds_tracebacks_with_the_notes_that_name_the_request(record) -> None:
    try:
        raise KeyError("bug")
    except KeyError as error:
        error.add_note("request r")
        line = JsonLines().format(record("unexpected error", exc_info=True))
    said = json.loads(line)
    assert said["exception"].startswith("Traceback")
    assert said["exception"].endswith("KeyError: 'bug'\nrequest r")


def test_what_is_told_of_errors_holds_nothing_of_a_clients_words() -> None:
    assert told(Unavailable("lost the decode worker at d:1")) == "lost the decode worker at d:1"
    assert told(InvalidArgument("stop", "my secret", "other texts")) == "stop is not as it should be"
    assert told(NotFound("model", "my secret")) == "NotFound"
    assert told(KeyError("my secret")) == "KeyError"


SET_UP = """
import logging
from cluster.logs.lines import set_up_logs
from cluster.logs.logging_config import LoggingConfig
logging.basicConfig()
set_up_logs(LoggingConfig(format={format!r}, level="info"), "p")
logging.getLogger("a").info("said")
logging.getLogger("a").debug("not said")
"""


@pytest.mark.parametrize(
    ("form", "level", "expected"),
    [
        ("text", None, "INFO a: said\n"),
        ("text", "error", ""),
        ("text", "debug", "INFO a: said\nDEBUG a: not said\n"),
    ],
)
def test_a_process_says_it_as_configured_unless_its_environment_knows_better(
    form: str, level: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TANDEM_LOG_LEVEL", raising=False)
    if level is not None:
        monkeypatch.setenv("TANDEM_LOG_LEVEL", level)
    script = [sys.executable, "-c", SET_UP.format(format=form)]
    assert subprocess.run(script, capture_output=True, text=True, check=True).stderr == expected


def test_a_process_says_it_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TANDEM_LOG_LEVEL", raising=False)
    script = [sys.executable, "-c", SET_UP.format(format="json")]
    said = json.loads(subprocess.run(script, capture_output=True, text=True, check=True).stderr)
    assert (said["message"], said["worker_id"]) == ("said", "p")
