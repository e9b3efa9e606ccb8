"""Who calls, the names that tenants may have, and what those are told whom nobody knows."""

from __future__ import annotations

from dataclasses import dataclass

MAX_TENANT_CHARS = 128
# All that a caller is told of a key or token that does not count.
NOT_VALID = "the key or token is not valid"


@dataclass(frozen=True, slots=True)
class Caller:
    """`tenant` is "" where nobody is told apart. An operator may ask for the cluster's status."""

    tenant: str
    is_operator: bool


ANONYMOUS = Caller("", is_operator=True)


def is_tenant_name(name: object) -> bool:
    """Names stand in logs, refusals and files of keys: a word of visible characters."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= MAX_TENANT_CHARS
        and name.isprintable()
        and not set(name) & {" ", "#"}
    )
