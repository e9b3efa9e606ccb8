"""What is logged of callers that are refused: who and why, and a bounded number of lines."""

from engine.refusal_log import MAX_LINES, PERIOD_S, RefusalLog

PEER = "ipv4:10.0.0.1:4711"


def test_a_problem_of_a_peer_is_told_once_a_period_whatever_its_port() -> None:
    log = RefusalLog()
    assert log.line(PEER, "cut off", 0.0, "after 3 s") == "ipv4:10.0.0.1: cut off: after 3 s"
    assert log.line("ipv4:10.0.0.1:4712", "cut off", 1.0, "after 4 s") is None
    assert log.line(PEER, "refused", 1.0) == "ipv4:10.0.0.1: refused"
    assert (
        log.line(PEER, "cut off", PERIOD_S, "after 5 s")
        == "ipv4:10.0.0.1: cut off: after 5 s (1 more since the last line)"
    )


def test_however_many_callers_there_are_the_lines_are_few() -> None:
    log = RefusalLog()
    lines = [log.line(f"ipv4:10.0.{index}.1:1", "cut off", 0.0) for index in range(1000)]
    assert sum(line is not None for line in lines) == MAX_LINES
    assert "990 more" in str(log.line(PEER, "cut off", PERIOD_S))


def test_a_peer_that_has_gone_has_no_address() -> None:
    assert RefusalLog().line("", "cut off", 0.0) == "somebody who has gone: cut off"
