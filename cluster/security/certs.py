"""Certificates for development: a CA, and a leaf for each end, in folders as Kubernetes lays out TLS secrets.

    FOLDER/ca/ca.crt, ca.key                      keep the key: `tandem certs` makes new leaves with it
    FOLDER/gateway/ca.crt, tls.crt, tls.key       the gateway, towards the workers
    FOLDER/worker/…                               every worker
    FOLDER/clients/…                              the gateway, towards its clients: names the hosts they reach it by

Between gateway and workers a certificate says what its holder is, not where it runs: workers come and go under any
address. In production cert-manager fills the same files, with the names below.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cluster.security.names import GATEWAY_NAME, WORKER_NAME
from engine.errors import ConfigError

CA_DAYS = 3650
# Clocks differ; a certificate made here must be good there at once.
EARLIER = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Signer:
    """A CA: its certificate, and the key that signs leaves."""

    cert: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make_certs(folder: Path, hosts: Sequence[str], days: int) -> list[Path]:
    """New leaves for gateway, workers and the clients' port (`hosts`: names and addresses), good for `days`; and a CA
    where `folder` has none. Returns the folders of the leaves. Raises ConfigError."""
    signer = own_ca(folder / "ca")
    leaves = {"gateway": [GATEWAY_NAME], "worker": [WORKER_NAME], "clients": list(hosts)}
    for name, hosts_of in leaves.items():
        cert, key = make_leaf(signer, hosts_of, timedelta(days=days))
        _write(folder / name / "ca.crt", _pem(signer.cert))
        _write(folder / name / "tls.crt", cert)
        _write(folder / name / "tls.key", key, is_secret=True)
    return [folder / name for name in leaves]


def make_ca(now: datetime | None = None) -> Signer:
    """A CA of its own, good for ten years."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Tandem development CA")])
    begin = (now or datetime.now(UTC)) - EARLIER
    builder = _builder(name, name, key, begin, begin + timedelta(days=CA_DAYS))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(signs_certs=True), critical=True)
    return Signer(builder.sign(key, hashes.SHA256()), key)


def make_leaf(
    signer: Signer, hosts: Sequence[str], lifetime: timedelta, now: datetime | None = None
) -> tuple[bytes, bytes]:
    """(certificate, private key) in PEM for `hosts`, DNS names and IP addresses. Either end may show it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    begin = (now or datetime.now(UTC)) - EARLIER
    builder = _builder(name, signer.cert.subject, key, begin, begin + EARLIER + lifetime)
    builder = builder.add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(signs_certs=False), critical=True)
    uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = builder.add_extension(x509.ExtendedKeyUsage(uses), False)
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key())
    cert = builder.add_extension(authority, False).sign(signer.key, hashes.SHA256())
    return _pem(cert), _key_pem(key)


def own_ca(folder: Path) -> Signer:
    """The CA in `folder`, or a new one. Raises ConfigError for files that are none."""
    cert_path, key_path = folder / "ca.crt", folder / "ca.key"
    if not cert_path.exists() and not key_path.exists():
        signer = make_ca()
        _write(key_path, _key_pem(signer.key), is_secret=True)
        _write(cert_path, _pem(signer.cert))
        return signer
    try:
        key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
        cert = x509.load_pem_x509_certificate(cert_path.read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{folder}: expected ca.crt and ca.key of an earlier run, or neither: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or cert.public_key() != key.public_key():
        raise ConfigError(f"{folder}: ca.key is not the key of ca.crt")
    return Signer(cert, key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, begin: datetime, end: datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(begin).not_valid_after(end)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)


def _key_usage(*, signs_certs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certs,
        crl_sign=signs_certs,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise ConfigError(f"--host: got {host!r}, expected a DNS name or an IP address") from None


def _pem(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes, *, is_secret: bool = False) -> None:
    """Whole or not at all, so that who reads it meanwhile sees the old content or the new."""
    new = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.unlink(missing_ok=True)
        with open(new, "xb", opener=lambda name, flags: os.open(name, flags, 0o600 if is_secret else 0o644)) as file:
            file.write(content)
        new.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
