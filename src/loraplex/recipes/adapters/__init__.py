"""Saved adapters of runs: loaded, evaluated, exported, looked into."""
