"""Log records as lines: text for people, JSON for machines. Both say what a record is about (engine/log_fields.py)."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime

from cluster.environment import read_environment
from cluster.logs.logging_config import LoggingConfig
from engine.log_fields import FIELDS

TEXT = "%(levelname)s %(name)s: %(message)s"


def set_up_logs(config: LoggingConfig, worker_id: str = "") -> None:
    """Has this process write its log to stderr as `config` says, from now on. `worker_id` "": it is no worker."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(worker_id) if config.format == "json" else TextLines())
    given = read_environment().log_level
    level = logging.getLevelNamesMapping()[config.level.upper()] if given is None else given
    logging.basicConfig(handlers=[handler], level=level, force=True)


class TextLines(logging.Formatter):
    """`LEVEL logger: message`, and behind it name=value of each field."""

    def __init__(self) -> None:
        super().__init__(TEXT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = (f"{name}={_word(value)}" for name, value in _fields(record).items())
        return " ".join((super().formatMessage(record), *fields))


class JsonLines(logging.Formatter):
    """One object a line, in UTC. `worker_id` is part of each."""

    def __init__(self, worker_id: str = "") -> None:
        super().__init__()
        self._own = {"worker_id": worker_id} if worker_id else {}

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._own,
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    fields = getattr(record, FIELDS, None)
    return fields if isinstance(fields, Mapping) else {}


def _word(value: object) -> str:
    """What stays one word, and on one line, whoever chose it."""
    text = str(value)
    is_plain = text.isprintable() and not set(text) & set(' "=')
    return text if is_plain and text else json.dumps(text)
