"""What the command line's calls show to a service, and what they ask of it: a key or token, and a certificate."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.environment import read_environment
from engine.errors import ConfigError

if TYPE_CHECKING:
    from tandem.client import Client


@dataclass(frozen=True, slots=True)
class Access:
    """`api_key`: an API key or token, "" for none. `ca`: PEM of who signs the service's certificate, None for a
    connection in plain text."""

    api_key: str = field(default="", repr=False)
    ca: bytes | None = None

    def client(self, url: str, *, timeout_s: float | None = None) -> Client:
        """A client of the service at `url`, "host:port"."""
        # gRPC takes a while to load, and `tandem --help` does without.
        from tandem.client import Client

        return Client(url, api_key=self.api_key, ca=self.ca, timeout_s=timeout_s)


OPEN_ACCESS = Access()


def read_access(key_file: Path | None, ca_file: Path | None, url: str) -> Access:
    """By --api-key-file, else TANDEM_API_KEY, and --ca. Raises ConfigError, which never shows a key, where it cannot be
    one, or would go to `url` in clear."""
    from tandem.client import check_key

    ca = None if ca_file is None else read_ca(ca_file)
    place = "TANDEM_API_KEY" if key_file is None else "--api-key-file"
    key = read_environment().api_key if key_file is None else _read_key(key_file)
    try:
        check_key(key, url, is_encrypted=ca is not None)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None
    return Access(key, ca)


def _read_key(file: Path) -> str:
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        # Without its name: that may be the key itself, given by mistake.
        raise ConfigError("--api-key-file: cannot be read, expected the path of a file that holds the key") from None
    if not key:
        raise ConfigError("--api-key-file: the file is empty, expected an API key or a token")
    return key


def read_ca(file: Path) -> bytes:
    """Certificates of who signs the service's own, in PEM. Raises ConfigError."""
    try:
        pem = file.read_bytes()
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise ConfigError(f"--ca: {file}: expected certificates, in PEM") from None
    except OSError as error:
        raise ConfigError(f"--ca: {file}: {error.strerror}") from None
    return pem
