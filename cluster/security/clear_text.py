"""What of a configuration lets others read along, and is likely to be a mistake."""

from __future__ import annotations

import ipaddress
import logging

from cluster.config import TandemConfig

_log = logging.getLogger(__name__)


def warn_of_clear_text(config: TandemConfig, host: str) -> None:
    """One line in the log, where there is something to tell."""
    if (warning := clear_text_warning(config, host)) is not None:
        _log.warning("%s", warning)


def clear_text_warning(config: TandemConfig, host: str) -> str | None:
    """What to tell of a gateway whose clients reach it on `host`; None for nothing."""
    if config.security.client_certs is not None or _is_loopback(host):
        return None
    if config.gateway.auth.is_required:
        return f"keys come in clear to {host}: set security.client_certs, unless TLS ends in front of this gateway"
    return f"whoever reaches {host} may use this service, in clear: see gateway.auth and security in SECURITY.md"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
