"""Which workers a request goes to: the router's policies, what they know of the workers, and what they learn."""
