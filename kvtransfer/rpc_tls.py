"""TLS for the wire: credentials out of a folder's files, read again when they change.

    FOLDER/ca.crt     who is trusted: the certificates that sign those of the peers
    FOLDER/tls.crt    this end's certificate, and any between it and the CA's
    FOLDER/tls.key    its private key

The names are those of a Kubernetes TLS secret, as cert-manager fills it. What cannot be used while it is being
replaced, a certificate without its key say, is passed over: what was read before stays in force until it is whole.
Connections that are open keep what they began with.
"""

from __future__ import annotations

import logging
import ssl
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc

from engine.errors import ConfigError

FILES = ("ca.crt", "tls.crt", "tls.key")

_log = logging.getLogger(__name__)

Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """What the three files held. `stamp` tells one content from the next."""

    stamp: Stamp
    ca: bytes
    cert: bytes
    key: bytes


class Tls:
    """One end's certificates, out of `folder`. Raises ConfigError for files that cannot be used at the start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = _read(folder)
        self._passed_over: Stamp | None = None

    def files(self) -> TlsFiles:
        """What is in force now."""
        try:
            stamp = _stamp(self.folder)
        except OSError:
            # One of them is not there at this moment.
            return self._files
        if stamp in (self._files.stamp, self._passed_over):
            return self._files
        try:
            self._files = _read(self.folder)
            _log.info("certificates in %s were read again", self.folder)
        except ConfigError as error:
            self._passed_over = stamp
            _log.warning("%s; the certificates read before stay in force", error)
        return self._files

    def server_credentials(self, *, require_client: bool) -> grpc.ServerCredentials:
        """For a server that shows this certificate. `require_client`: only to callers with one of the same CA."""

        def configuration() -> grpc.ServerCertificateConfiguration:
            files = self.files()
            return grpc.ssl_server_certificate_configuration([(files.key, files.cert)], files.ca)

        # gRPC asks for it again at every handshake, in a thread of its own.
        return grpc.dynamic_ssl_server_credentials(configuration(), configuration, require_client)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For calls to servers of the same CA, with the certificates in force now."""
        files = self.files()
        return grpc.ssl_channel_credentials(files.ca, files.key, files.cert)


def _stamp(folder: Path) -> Stamp:
    found = [(folder / name).stat() for name in FILES]
    return tuple((stat.st_mtime_ns, stat.st_ino, stat.st_size) for stat in found)


def _read(folder: Path) -> TlsFiles:
    try:
        stamp = _stamp(folder)
        ca, cert, key = ((folder / name).read_bytes() for name in FILES)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}; expected {', '.join(FILES)} in {folder}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(folder / "tls.crt", folder / "tls.key", _no_password)
    except (ssl.SSLError, ValueError, OSError):
        raise ConfigError(f"{folder}: tls.crt and tls.key are no certificate and its key, in PEM") from None
    try:
        context.load_verify_locations(cadata=ca.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise ConfigError(f"{folder / 'ca.crt'}: no certificates, in PEM") from None
    with suppress(OSError):
        if stamp == _stamp(folder):
            return TlsFiles(stamp, ca, cert, key)
    raise ConfigError(f"{folder}: the files changed while they were read")


def _no_password() -> str:
    # Otherwise OpenSSL would ask for it at the terminal.
    raise ValueError("the key is encrypted")
