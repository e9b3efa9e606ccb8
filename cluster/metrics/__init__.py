"""What Prometheus is shown of a cluster, by its gateway: docs/observability.md."""
