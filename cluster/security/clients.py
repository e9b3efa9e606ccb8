"""Who may call a gateway: API keys and tokens, out of files that may change while it runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from cluster.security.api_keys import PREFIX, parse_keys
from cluster.security.auth_config import AuthConfig
from cluster.security.caller import NOT_VALID, Caller
from cluster.yaml_file import read_text
from engine.errors import ConfigError, Unauthenticated

MISSING = "expected metadata `authorization: Bearer` with an API key or a token"

_log = logging.getLogger(__name__)
Credentials = TypeVar("Credentials", bound="_Knows")


class _Knows(Protocol):
    def tenant_of(self, credential: str, /) -> str:
        """Raises Unauthenticated."""
        ...


class Clients:
    """Knows callers by what `config` names. Raises ConfigError for files that cannot be used."""

    def __init__(self, config: AuthConfig) -> None:
        assert config.is_required, "without keys and tokens everybody may call"
        self._operators = frozenset(config.operators)
        self._keys = _WatchedFile(config.keys_file, parse_keys) if config.keys_file is not None else None
        self._tokens = None
        if config.jwt.keys_file is not None:
            # Imported here: who does without tokens does without their libraries.
            from cluster.security.jwt_tokens import JwtTokens, parse_verify_keys

            def parse(text: str, where: str) -> JwtTokens:
                return JwtTokens(parse_verify_keys(text, where), config.jwt)

            self._tokens = _WatchedFile(config.jwt.keys_file, parse)

    def caller(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        """Who a call with this metadata is from. Raises Unauthenticated."""
        credential = credential_of(metadata)
        source = self._keys if credential.startswith(PREFIX) else self._tokens
        if source is None:
            raise Unauthenticated(NOT_VALID, "a kind of credential that this gateway does not take")
        tenant = source.content.tenant_of(credential)
        return Caller(tenant, tenant in self._operators)

    def refresh(self) -> None:
        """Reads files that have changed. One that cannot be used changes nothing, and the log says so once."""
        for file in (self._keys, self._tokens):
            if file is not None:
                file.refresh()


class _WatchedFile(Generic[Credentials]):
    """What a file holds, as of its last content that could be parsed."""

    def __init__(self, path: Path, parse: Callable[[str, str], Credentials]) -> None:
        self._path = path
        self._parse = parse
        self._text = read_text(path)
        self._problem = ""
        self.content = parse(self._text, str(path))

    def refresh(self) -> None:
        problem, bug = "", None
        try:
            # Whole, and not by its time: that is the same after two changes within a tick of the file system's clock.
            text = read_text(self._path)
            if text != self._text:
                self.content = self._parse(text, str(self._path))
                self._text = text
                _log.info("%s has changed and counts now", self._path)
        except ConfigError as error:
            problem = str(error)
        except Exception as error:
            # A bug of one file's reader must not end the reading of either: a key that is revoked would go on counting.
            problem, bug = f"{self._path}: reading it has crashed: {type(error).__name__}", error
        if problem and problem != self._problem:
            _log.error("%s; what it said before still counts", problem, exc_info=bug)
        self._problem = problem


def credential_of(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The one key or token in a call's metadata. Raises Unauthenticated where there is none, or more than one."""
    found: list[str] = []
    for name, value in metadata:
        if name not in ("authorization", "x-api-key"):
            continue
        text = value if isinstance(value, str) else value.decode("latin-1")
        if name == "authorization":
            scheme, _, text = text.partition(" ")
            if scheme.lower() != "bearer":
                raise Unauthenticated(MISSING, "another scheme than Bearer")
        found.append(text.strip())
    if len(found) != 1 or not found[0]:
        raise Unauthenticated(MISSING, "several credentials at once" if len(found) > 1 else "no credential")
    return found[0]
