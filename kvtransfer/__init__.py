"""Moves KV blocks between workers; decides nothing."""
