"""The embedded default: a world of procedural portraits and the tiny models that live in it."""
