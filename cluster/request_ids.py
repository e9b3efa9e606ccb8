"""The ids of the requests that a gateway has at the moment, by tenant: another's ids are nobody's business."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import InvalidArgument


class RequestIds:
    """No tenant has an id twice at a time."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._taken: set[tuple[str, str]] = set()
        self._to_come = 0
        self._given_back = asyncio.Event()

    def new(self, tenant: str) -> str:
        """An id that no running request of a tenant has."""
        while (tenant, request_id := f"{self._rng.getrandbits(64):016x}") in self._taken:
            pass
        return request_id

    @contextmanager
    def own(self, tenant: str, request_id: str, *, is_shared: bool = False) -> Iterator[str]:
        """Takes an id, a new one for "", until the request is over. Of an id that is taken, one with something new
        behind it where it `is_shared`; else raises InvalidArgument."""
        if (tenant, request_id) in self._taken:
            if not is_shared:
                raise InvalidArgument("request_id", request_id, "an id that no running request has")
            request_id = f"{request_id}-{self.new(tenant)}"
        request_id = request_id or self.new(tenant)
        self._taken.add((tenant, request_id))
        try:
            yield request_id
        finally:
            self._taken.remove((tenant, request_id))
            self._given_back.set()

    @contextmanager
    def to_come(self) -> Iterator[None]:
        """Around what a request needs before it takes its id, which it does at once afterwards."""
        self._to_come += 1
        try:
            yield
        finally:
            self._to_come -= 1
            self._given_back.set()

    async def until_none(self) -> None:
        """Until no request is left, and none is to come."""
        while self._taken or self._to_come:
            self._given_back.clear()
            await self._given_back.wait()

    def check_empty(self) -> None:
        assert not self._taken, f"requests still run: {sorted(self._taken)}"
        assert not self._to_come, f"{self._to_come} requests are still to take their ids"
