"""What servers accept of a plain LoRA adapter, and how they are told to load it."""

from __future__ import annotations

from dataclasses import dataclass

PORTABLE = "portable"


@dataclass(frozen=True)
class Engine:
    """A server, or "portable" for what all of them load."""

    name: str
    ranks: tuple[int, ...] = ()
    """Values that the server's rank limit can take; empty: any rank."""
    full_modules: bool = False
    """Whether modules and biases that were trained in full can go along."""
    head: bool = False
    """Whether an adapter on an output head that shares its weight with the embedding is applied."""
    together: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()
    """Where one of the first names is adapted, the second ones have to be in the file too; with zeros if need be."""
    command: str = ""
    """How to serve {folder} with rank {rank} on {base}."""

    def rank(self, needed: int) -> int:
        """The rank to write for updates of rank `needed`.

        Raises:
            ValueError: the server accepts no rank that is large enough.
        """
        if not self.ranks:
            return needed
        fitting = [rank for rank in self.ranks if rank >= needed]
        if not fitting:
            raise ValueError(
                f"rank {needed} is more than {self.name} accepts ({max(self.ranks)}): shrink it with --compress exact, "
                f"or approximate with --rank {max(self.ranks)}."
            )
        return min(fitting)


# SGLang computes these in one product and stops at an adapter that has only a part of them: it fills in k and up by
# itself, but not q, v and gate.
_FUSED = ((("q_proj", "k_proj", "v_proj"), ("q_proj", "v_proj")), (("up_proj",), ("gate_proj",)))

ENGINES = {
    engine.name: engine
    for engine in (
        Engine(PORTABLE, together=_FUSED),
        Engine("peft", full_modules=True, head=True, command="PeftModel.from_pretrained(base, {folder!r})"),
        Engine(
            "vllm",
            # vLLM's MaxLoRARanks; --max-lora-rank takes no other value.
            ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
            head=True,
            command="vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules NAME={folder}",
        ),
        Engine(
            "sglang",
            head=True,
            together=_FUSED,
            command="python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths NAME={folder}",
        ),
        Engine(
            "llama.cpp",
            command=(
                "python convert_hf_to_gguf.py {base} --outfile base.gguf\n"
                "python convert_lora_to_gguf.py {folder} --base {base} --outfile adapter.gguf\n"
                "llama-server -m base.gguf --lora adapter.gguf"
            ),
        ),
    )
}


def engine_named(name: str) -> Engine:
    """The engine of this name.

    Raises:
        ValueError: it is unknown.
    """
    if name not in ENGINES:
        raise ValueError(f"engine={name!r} is unknown: use one of {', '.join(ENGINES)}.")
    return ENGINES[name]
