"""The last minutes, second by second."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import pytest

from cluster.history import FLOW_SECONDS, HISTORY_SECONDS, MAX_PAIRS, Flow, History, Second
from cluster.messages import ClusterStatus, WorkerStatus
from cluster.outcomes import NOT_COUNTED, Reason
from tests.cluster.ended import RECEIPT, ended

EVERYTHING = -1


def worker(role: str, waiting: int) -> WorkerStatus:
    return WorkerStatus(f"{role}-0", role, "a:1", 1, 0.1, True, False, 0, waiting, 0, 64, 64, 0, 0)


def status(**changes: object) -> ClusterStatus:
    return replace(ClusterStatus("tiny", (), requests_running=0, requests_waiting=0, requests_finished=0), **changes)


def between(pair: tuple[str, str], kv_bytes: int, at_s: float):
    receipt = replace(RECEIPT, prefill_worker=pair[0], decode_worker=pair[1], kv_bytes=kv_bytes)
    return ended(at_s=at_s, receipt=receipt)


def test_requests_count_in_the_second_in_which_they_ended() -> None:
    history = History()
    history.ended(ended(at_s=10.2))
    history.ended(ended(at_s=10.9, ttft_s=1.5))
    history.ended(ended(at_s=10.95, tpot_s=0.2, was_local=True, receipt=None))
    history.ended(ended(at_s=12.0))
    first, silent, last = history.since(EVERYTHING, 13.0)
    assert first == Second(10, finished=3, met=1, met_ttft=2, met_tpot=2, local=1, kv_bytes=6000)
    assert silent == Second(11), "a second in which nothing happened is one too"
    assert last == Second(12, finished=1, met=1, met_ttft=1, met_tpot=1, kv_bytes=3000)


@pytest.mark.parametrize("reason", ["rejected", "failed", "expired", *NOT_COUNTED])
def test_who_did_not_finish_has_met_nothing(reason: Reason) -> None:
    history = History()
    history.ended(ended(at_s=10.0, reason=reason, was_local=True, receipt=None))
    assert history.since(EVERYTHING, 11.0) == [replace(Second(10), **{reason: 1})]


def test_a_second_is_told_once_it_is_over_and_never_changes_then() -> None:
    history = History()
    history.ended(ended(at_s=10.0))
    assert history.since(EVERYTHING, 10.99) == []
    history.ended(ended(at_s=10.99))
    told = history.since(EVERYTHING, 11.0)
    assert [second.finished for second in told] == [2]
    history.ended(ended(at_s=11.5))
    assert [second.number for second in history.since(10, 13.2)] == [11, 12]
    assert history.since(EVERYTHING, 13.2)[0] == told[0]


def test_queues_are_as_they_were_when_they_were_looked_at() -> None:
    history = History()
    workers = (worker("prefill", 3), worker("decode", 2), worker("decode", 5))
    history.sample(status(workers=workers, requests_running=7, requests_waiting=4), 10.5)
    history.ended(ended(at_s=11.0))
    looked, other = history.since(EVERYTHING, 12.0)
    assert (looked.running, looked.waiting, looked.waiting_prefill, looked.waiting_decode) == (7, 4, 3, 7)
    assert (other.running, other.waiting, other.waiting_prefill, other.waiting_decode) == (None,) * 4


def test_tokens_are_those_that_came_since_the_last_look() -> None:
    history = History()
    history.sample(status(prompt_tokens=100, generation_tokens=10), 10.5)
    history.sample(status(prompt_tokens=130, generation_tokens=10), 11.4)
    history.sample(status(prompt_tokens=150, generation_tokens=17), 11.9)
    seconds = history.since(EVERYTHING, 12.0)
    assert [(second.prompt_tokens, second.answer_tokens) for second in seconds] == [(100, 10), (50, 7)]


def test_kv_flows_are_a_mean_and_the_largest_comes_first() -> None:
    history = History()
    history.ended(between(("p", "d"), 300, 10.0))
    history.ended(between(("p", "e"), 1200, 11.0))
    history.ended(between(("p", "d"), 600, 12.0))
    assert history.flows(13.0) == [Flow("p", "e", 1200 / FLOW_SECONDS), Flow("p", "d", 900 / FLOW_SECONDS)]
    assert history.flows(10.0 + FLOW_SECONDS)[1] == Flow("p", "d", 900 / FLOW_SECONDS)
    assert history.flows(11.0 + FLOW_SECONDS)[1] == Flow("p", "d", 600 / FLOW_SECONDS)
    assert history.flows(14.0 + FLOW_SECONDS) == []


def test_pairs_beyond_the_limit_are_summed_up() -> None:
    history = History()
    for number in range(MAX_PAIRS + 50):
        history.ended(between((f"p{number}", "d"), 30 * FLOW_SECONDS, 10.0))
    flows = history.flows(11.0)
    assert len(flows) == MAX_PAIRS + 1
    assert flows[-1] == Flow("", "", 30 * 50)


def test_pairs_of_many_seconds_are_summed_up_beyond_the_same_limit() -> None:
    history = History()
    for number in range(4 * MAX_PAIRS):
        history.ended(between((f"p{number}", "d"), (number + 1) * FLOW_SECONDS, 10.0 + number * 8 / (4 * MAX_PAIRS)))
    flows = history.flows(18.0)
    assert [flow.bytes_per_s for flow in flows[:-1]] == list(range(4 * MAX_PAIRS, 3 * MAX_PAIRS, -1))
    assert flows[-1] == Flow("", "", sum(range(3 * MAX_PAIRS + 1)))


def test_after_a_long_silence_only_what_is_kept_is_filled_up() -> None:
    history = History()
    history.ended(ended(at_s=10.0))
    seconds = history.since(EVERYTHING, 1e9)
    assert len(seconds) == HISTORY_SECONDS - 1
    assert seconds[-1] == Second(10**9 - 1)


def test_its_memory_is_bounded() -> None:
    tracemalloc.start()
    try:
        history = History()
        sizes = []
        for second in range(3 * HISTORY_SECONDS):
            # The names are the registry's: they are counted here all the same.
            for number in range(MAX_PAIRS if second % HISTORY_SECONDS > HISTORY_SECONDS - 2 * FLOW_SECONDS else 1):
                history.ended(between((f"p{number}", "d"), 1, float(second)))
            history.sample(status(prompt_tokens=second), second + 0.5)
            if second % HISTORY_SECONDS == HISTORY_SECONDS - 1:
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert max(sizes) < 2 << 20
    assert sizes[-1] < 1.1 * sizes[0]
