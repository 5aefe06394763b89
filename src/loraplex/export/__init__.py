"""Adapters as others take them: plain LoRAs, exact or approximate, and merged checkpoints."""
