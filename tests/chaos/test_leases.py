"""How long what a fault had broken was held, from the workers' notes."""

from __future__ import annotations

import pytest

from cluster.chaos.faults import Happened
from cluster.chaos.leases import LeaseBook

ADDRESSES = {"127.0.0.1:1": "prefill-0", "127.0.0.1:2": "decode-0"}


def book() -> LeaseBook:
    return LeaseBook(lambda address: "gateway" if address == "gateway" else ADDRESSES.get(address, ""))


def pull(leases: LeaseBook, opened_s: float) -> None:
    """decode-0 pulls a prompt from prefill-0: a lease at either end."""
    leases.noted("decode-0", {"opened": 0, "request": "r#1", "peer": "127.0.0.1:1"}, opened_s)
    leases.noted("prefill-0", {"opened": 0, "request": "r#1", "peer": ""}, opened_s)


def closed(leases: LeaseBook, worker_id: str, when_s: float, *, is_broken: bool = True) -> None:
    leases.noted(worker_id, {"closed": 0, "is_broken": is_broken}, when_s)


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_a_lease_is_broken_by_a_fault_at_either_end(victim: str) -> None:
    leases = book()
    pull(leases, 1.0)
    closed(leases, "prefill-0", 8.0)
    closed(leases, "decode-0", 9.5)
    assert leases.held_s([Happened("partition", victim, 2.0, 32.0)]) == {"partition": 7.5}
    assert leases.held_s([Happened("partition", "decode-1", 2.0, 32.0)]) == {"partition": 0.0}
    assert leases.held_s([Happened("kill", victim, 9.6)]) == {}, "it came later"
    assert leases.held_s([Happened("kill", victim, 0.9)]) == {}, "it came before"
    assert leases.held_s([Happened("slow", victim, 2.0, 5.0)]) == {}, "it takes nobody away"


def test_a_lease_on_a_peer_who_was_away_already_counts_from_its_own_beginning() -> None:
    leases = book()
    pull(leases, 3.0)
    closed(leases, "decode-0", 11.0)
    assert leases.held_s([Happened("stop", "prefill-0", 2.0, 32.0)]) == {"stop": 8.0}
    assert leases.held_s([Happened("stop", "prefill-0", 1.0, 2.0)]) == {}, "who was there again by then"


def test_of_several_faults_the_last_one_counts() -> None:
    leases = book()
    pull(leases, 1.0)
    closed(leases, "decode-0", 8.0)
    faults = [Happened("stop", "prefill-0", 2.0, 3.0), Happened("kill", "prefill-0", 7.0)]
    assert leases.held_s(faults) == {"kill": 1.0}


def test_what_ends_as_it_should_is_nobodys_fault() -> None:
    leases = book()
    pull(leases, 1.0)
    closed(leases, "prefill-0", 8.0, is_broken=False)
    closed(leases, "decode-0", 8.0, is_broken=False)
    assert leases.held_s([Happened("kill", "decode-0", 2.0)]) == {}


def test_who_was_stopped_gives_back_when_it_goes_on() -> None:
    leases = book()
    pull(leases, 1.0)
    closed(leases, "decode-0", 9.0)
    closed(leases, "prefill-0", 32.4)
    assert leases.held_s([Happened("stop", "prefill-0", 2.0, 32.0)]) == {"stop": 7.0}
    leases = book()
    pull(leases, 1.0)
    closed(leases, "prefill-0", 32.5)
    assert leases.held_s([Happened("stop", "prefill-0", 2.0, 32.0)]) == {"stop": 0.5}


def test_what_a_dead_process_held_is_gone() -> None:
    leases = book()
    pull(leases, 1.0)
    leases.noted("prefill-0", {}, 2.1)
    closed(leases, "decode-0", 2.3)
    pull_again = {"opened": 0, "request": "r#2", "peer": ""}
    leases.noted("prefill-0", pull_again, 9.0)
    closed(leases, "prefill-0", 9.5, is_broken=False)
    assert leases.held_s([Happened("kill", "prefill-0", 2.0)]) == {"kill": pytest.approx(0.3)}


def test_a_gateways_stream_is_a_lease_too() -> None:
    leases = book()
    leases.noted("decode-0", {"opened": 0, "request": "", "peer": "gateway"}, 1.0)
    closed(leases, "decode-0", 9.0)
    assert leases.held_s([Happened("partition", "decode-0", 2.0, 5.0, peer="gateway")]) == {"partition": 7.0}


def test_who_is_cut_off_from_everybody_must_become_empty() -> None:
    leases = book()
    for time_s, blocks in ((0.5, 4), (2.5, 6), (3.0, 0), (3.5, 2), (7.0, 0), (50.0, 3)):
        leases.noted("prefill-0", {"held": blocks}, time_s)
    cut = Happened("partition", "prefill-0", 2.0, 32.0)
    assert leases.held_s([cut]) == {"partition": 5.0}
    assert leases.held_s([Happened("partition", "prefill-0", 10.0, 20.0)]) == {"partition": 0.0}
    assert leases.held_s([Happened("partition", "prefill-0", 2.0, 6.0)]) == {"partition": 4.0}, "all the time"
    assert leases.held_s([Happened("partition", "prefill-0", 2.0, 32.0, peer="gateway")]) == {}, "others feed it"
