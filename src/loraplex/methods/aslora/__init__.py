"""ASLoRA: one A for a family of layers, and B's that are merged while training runs."""
