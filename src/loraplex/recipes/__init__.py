"""A YAML run: from its configuration to a trained adapter, and what is done with the adapter afterwards."""
