"""Dual LoRA: ΔW = ReLU(B A) ⊙ Sign(D C)."""
