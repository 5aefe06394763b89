"""MASA: a group of adjacent layers shares several A; each layer has its own B."""
