"""What KubeRay's RayService waits for: an application of Ray Serve that runs while the gateway of its Ray cluster is
ready.

For a new release a RayService starts a second Ray cluster, and gives up the first one when all applications of the
second run. Requests never pass through Ray Serve. The application sits on the node that offers GATEWAY_RESOURCE: the
head, whose gateway it asks.
"""

from __future__ import annotations

import ssl
import time
from pathlib import Path

import httpx
from ray import serve
from ray.serve import Application

GATEWAY_RESOURCE = "tandem-gateway"
POLL_S = 1.0
ANSWER_S = 5.0


class Readiness:
    """Made once the gateway is ready at `url`; `ca`: who signs its certificate, "" for plain HTTP."""

    def __init__(self, url: str, ca: str = "") -> None:
        self._url = url
        self._ca = ca
        # Ray Serve calls this in a thread of its own, and takes the replica for starting meanwhile.
        while self._problem():
            time.sleep(POLL_S)

    def check_health(self) -> None:
        """Ray Serve asks every few seconds. Raises RuntimeError while the gateway is not ready."""
        if problem := self._problem():
            raise RuntimeError(f"{self._url}: {problem}")

    def _problem(self) -> str:
        try:
            # Made anew: certificates change.
            verify = ssl.create_default_context(cafile=Path(self._ca)) if self._ca else True
            answer = httpx.get(self._url, timeout=ANSWER_S, verify=verify, trust_env=False)
        except (httpx.HTTPError, OSError) as error:
            return f"{type(error).__name__}: {error}"
        return "" if answer.status_code == httpx.codes.OK else f"{answer.status_code}: {answer.text}"


def application(arguments: dict[str, str]) -> Application:
    """The application, as `import_path` of a Serve configuration names it; `arguments` are those of Readiness."""
    options = {"num_cpus": 0, "resources": {GATEWAY_RESOURCE: 1}}
    return serve.deployment(name="readiness", ray_actor_options=options)(Readiness).bind(**arguments)
