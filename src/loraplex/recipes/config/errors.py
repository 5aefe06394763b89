"""The error of a configuration."""


class ConfigError(ValueError):
    """A configuration that can't be used; the message names the value, where it stands and the remedy."""
