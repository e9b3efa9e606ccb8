"""The application that a RayService waits for, on a real Ray with Ray Serve; run by test_on_ray.py."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import ray

from tests.e2e.service import eventually

# Ray Serve's own, while it is imported and while it starts.
pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
]
START_S = 120.0


@pytest.fixture
def gateway() -> Iterator[SimpleNamespace]:
    """What answers as the gateway's /ready does: `status` to all who ask."""
    state = SimpleNamespace(status=503, asked=0)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked += 1
            self.send_response(state.status)
            self.end_headers()
            self.wfile.write(b'{"status": "as told"}')

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/ready"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def test_it_runs_when_the_gateway_is_ready_and_is_unhealthy_when_not(gateway: SimpleNamespace) -> None:
    from ray import serve

    from cluster.ray_service import GATEWAY_RESOURCE, application

    ray.init(num_cpus=1, resources={GATEWAY_RESOURCE: 1}, include_dashboard=False, log_to_driver=False, address="local")
    try:
        serve.start(proxy_location="Disabled")
        target = serve.RunTarget(target=application({"url": gateway.url}), name="tandem", route_prefix=None)
        serve.run_many([target], wait_for_applications_running=False)

        def status() -> str:
            return str(serve.status().applications["tandem"].status.value)

        eventually(lambda: gateway.asked >= 2, START_S)
        assert status() == "DEPLOYING"
        gateway.status = 200
        eventually(lambda: status() == "RUNNING", START_S)
        gateway.status = 503
        eventually(lambda: status() != "RUNNING", START_S)
    finally:
        serve.shutdown()
        ray.shutdown()


def test_health_names_what_is_wrong(gateway: SimpleNamespace) -> None:
    from cluster.ray_service import Readiness

    gateway.status = 200
    readiness = Readiness(gateway.url)
    readiness.check_health()
    gateway.status = 503
    with pytest.raises(RuntimeError, match=r"/ready: 503: .*as told"):
        readiness.check_health()
