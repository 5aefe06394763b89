"""A stand-in with the real signatures; tests/servers compares them with the real package."""
