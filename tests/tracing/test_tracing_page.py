"""docs/tracing.md names the spans that there are."""

import re
from pathlib import Path

from tests.tracing.test_request_traces import PULLED

PAGE = Path(__file__).parents[2] / "docs" / "tracing.md"


def test_its_table_has_every_span_and_no_other() -> None:
    table = PAGE.read_text().partition("## What each span means")[2].partition("\n\nSpans are below")[0]
    named = [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    spans = [name.replace("MODEL", "m") for names in named for name in names]
    assert len(spans) == len(set(spans))
    assert set(spans) == set(PULLED) | {"chat m"}
