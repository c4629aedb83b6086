"""What a plugin and the engine promise each other: hooks, the registry, and the rules that hold."""
