"""What runs around a model: shards, offloading, quantised storage, optimizers' steps and loss scales."""
