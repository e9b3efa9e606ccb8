"""Faults where little is there to mend them: pools of different sizes that not every request fits, few attempts, and
clients that want no more than one.

Requests may fail here. What must hold: nobody gets a wrong token, only requests that have begun nowhere are told that
they are too long, and nothing is left anywhere.
"""

from __future__ import annotations

import random
from dataclasses import replace

from cluster.gateway_config import FailureConfig, GatewayConfig
from cluster.registry import Role
from engine.errors import InvalidArgument, TransferFailed, Unavailable
from tests.sim.faults import FaultWorld
from tests.sim.one_run import to_its_end
from tests.sim.traffic import MAX_CONTEXT, check_client

# What is over when its attempts are, or when nobody came in time.
MAY_FAIL = (Unavailable, TransferFailed)
POLICIES = ("recompute", "recompute", "retry", "fail")


class ScarceWorld(FaultWorld):
    """One worker of each role may hold any request in most worlds, the other only short ones, in some both."""

    def __init__(self, seed: int, requests: int, rate_s: float | None = None) -> None:
        super().__init__(seed, requests, rate_s)
        dice = random.Random(f"scarcity of {seed}")
        for client in self.clients:
            client.request = replace(client.request, on_failure=dice.choice(POLICIES))
        self._tokens = {
            f"{role}-{index}": int(MAX_CONTEXT * dice.choice(shares))
            for role in ("prefill", "decode")
            for index, shares in enumerate(((0.6, 1.1, 1.1, 2.0), (0.3, 0.5)))
        }

    def blocks_of(self, role: Role, name: str) -> int:
        block = self.shape.prefill_block if role == "prefill" else self.shape.decode_block
        return self._tokens[name] // block + 1

    def check_clients(self) -> None:
        for client in self.clients:
            may_fail = MAY_FAIL if client.seen else (*MAY_FAIL, InvalidArgument)
            check_client(client, self.oracle, 1e-6, may_refuse=self.routing.may_refuse, may_fail=may_fail)

    def _gateway_config(self) -> GatewayConfig:
        usual = GatewayConfig()
        changes = {"route_wait_s": usual.route_wait_s, "failures": FailureConfig()}
        return super()._gateway_config().model_copy(update=changes)


def simulate(seed: int, requests: int, rate_s: float | None = None) -> ScarceWorld:
    """Runs one seed to its end and checks everything; every failure says which seed it was."""
    return to_its_end(
        lambda: ScarceWorld(seed, requests, rate_s),
        f"seed {seed}, {requests} requests, rate {rate_s}",
        lambda world: f"{world.shape}, {world.routing}, {world.faults}",
    )
