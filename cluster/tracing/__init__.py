"""Traces of requests, by OpenTelemetry: what was measured becomes spans when a request ends."""
