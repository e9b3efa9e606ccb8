"""Small and unequal pools, few attempts, clients that want no retries: whatever fails, fails as it may, and is gone."""

from engine.errors import InvalidArgument
from tests.sim.scarcity import MAY_FAIL, simulate


def test_nothing_is_left_where_requests_may_fail():
    # Answers under way outgrow what is left of the pools in 116 and 180.
    worlds = [simulate(seed, requests=35) for seed in (*range(130, 190), 116)]
    clients = [client for world in worlds for client in world.clients]
    assert sum(client.complete is not None for client in clients) > len(clients) / 2
    assert sum(isinstance(client.error, InvalidArgument) for client in clients) > 30, "many fit no pool"
    failed = [client for client in clients if isinstance(client.error, MAY_FAIL)]
    assert {client.request.on_failure for client in failed} >= {"fail", "retry"}
    assert any(client.seen for client in failed)
    assert sum(client.complete.receipt.retries for client in clients if client.complete is not None) > 20
