"""The policies by name."""

from __future__ import annotations

from cluster.gateway_config import RouterConfig
from cluster.routing.baselines import BASELINES
from cluster.routing.goodput import GoodputRouter
from cluster.routing.query import Router


def make_router(config: RouterConfig) -> Router:
    """The policy that `config.policy` names; a fresh one, which has learned nothing yet."""
    if config.policy == GoodputRouter.name:
        return GoodputRouter(config)
    return BASELINES[config.policy](config)
