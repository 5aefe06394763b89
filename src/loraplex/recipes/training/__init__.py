"""The training of a run: trainer, checkpoints, metrics, and what it leaves behind."""
