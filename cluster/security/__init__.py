"""Who may do what: certificates, clients' keys and quotas, tickets for KV streams."""
