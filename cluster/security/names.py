"""What the certificates of gateway and workers name: roles, not hosts."""

GATEWAY_NAME = "gateway.tandem.internal"
WORKER_NAME = "worker.tandem.internal"
