"""Signatures of vLLM 0.32."""

from dataclasses import dataclass


@dataclass
class LoRARequest:
    """The fields that we set, in vLLM's order."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
