"""`GET /`: the page for people who run the service: one HTML document, its style and script in it, and no data.

Nothing else may run in it, or be loaded: its policy names the hashes of both, and lets it connect to where it came
from. Whatever its script puts into it goes there as text, which the policy enforces too (trusted types).
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response

FILES = resources.files("cluster.http") / "page_files"
# In this order they are one script: each uses what stands before it.
SCRIPTS = ("elements.js", "figures.js", "pools.js", "flows.js", "charts.js", "requests.js", "inspector.js", "main.js")


class Page:
    """Read once: it is the same for everybody."""

    def __init__(self) -> None:
        style = _read("page.css")
        script = "\n".join(_read(name) for name in SCRIPTS)
        html = _read("page.html")
        for mark, text in (("/* style */", style), ("/* script */", script)):
            assert html.count(mark) == 1, f"{mark} has one place in the page"
            html = html.replace(mark, text)
        self._html = html.encode()
        self._headers = {
            "content-security-policy": _policy(style, script),
            "x-content-type-options": "nosniff",
            # For browsers that do not know frame-ancestors.
            "x-frame-options": "DENY",
            "referrer-policy": "no-referrer",
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "same-origin",
            # A new release is a new page.
            "cache-control": "no-cache",
        }

    async def page(self, request: Request) -> Response:
        return Response(self._html, headers=self._headers, media_type="text/html")


def _read(name: str) -> str:
    return (FILES / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_hash(script)}'",
            f"style-src '{_hash(style)}'",
            "connect-src 'self'",
            # Its icon.
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
