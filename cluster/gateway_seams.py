"""What a gateway asks of others, where there are any: a controller of roles, and who allows KV streams."""

from __future__ import annotations

from typing import Literal, Protocol

from cluster.registry import Role, WorkerReport
from cluster.routing.query import Route
from decode_worker.stream import Submit
from engine.objectives import Objectives


class RoleController(Protocol):
    """Who decides which role each worker should have, from what it is told of the requests
    (cluster/controller_loop.py). Counts of tokens are of one request; `max_tokens` and `answer_tokens` of all its
    choices together."""

    def wanted_role(self, worker_id: str) -> Role | Literal[""]:
        """The role to ask a worker for that has just reported; "" leaves it as it is."""
        ...

    def arrived(self, prompt_tokens: int, max_tokens: int, objectives: Objectives) -> None:
        """A request came in good order."""
        ...

    def answered(self, prompt_tokens: int, cached_tokens: int, max_tokens: int, answer_tokens: int) -> None:
        """A request was answered whole."""
        ...


class Tickets(Protocol):
    """Who allows KV streams (cluster/security/ticket_office.py)."""

    @property
    def public_key(self) -> bytes: ...

    def check_report(self, report: WorkerReport) -> None:
        """Raises InvalidArgument for a worker that could not make use of tickets."""
        ...

    def ticket(self, route: Route, submit: Submit, now: float) -> bytes:
        """Leave for what `submit` makes a decode worker ask of a prefill worker."""
        ...
