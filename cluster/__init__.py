"""Everything that sees more than one worker: gateway, router, registry, Ray actors, CLI."""
