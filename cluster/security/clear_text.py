"""What of a configuration lets others read along, and is likely to be a mistake."""

from __future__ import annotations

import logging

from cluster.config import TandemConfig
from cluster.host_port import is_loopback

_log = logging.getLogger(__name__)


def warn_of_clear_text(config: TandemConfig, host: str) -> None:
    """One line in the log, where there is something to tell."""
    if (warning := clear_text_warning(config, host)) is not None:
        _log.warning("%s", warning)


def clear_text_warning(config: TandemConfig, host: str) -> str | None:
    """What to tell of a gateway whose clients reach it on `host`; None for nothing."""
    if config.security.client_certs is not None or is_loopback(host):
        return None
    if config.gateway.auth.is_required:
        return f"keys come in clear to {host}: set security.client_certs, unless TLS ends in front of this gateway"
    return f"whoever reaches {host} may use this service, in clear: see gateway.auth and security in SECURITY.md"
