"""Signatures of vLLM 0.32."""

from abc import ABC, abstractmethod
from collections.abc import Set

from vllm.lora.request import LoRARequest


class LoRAResolver(ABC):
    """What vLLM asks for an adapter's name."""

    @abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter, or None."""


class _LoRAResolverRegistry:
    def __init__(self) -> None:
        self.resolvers: dict[str, LoRAResolver] = {}

    def get_supported_resolvers(self) -> Set[str]:
        return self.resolvers.keys()

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        assert resolver_name not in self.resolvers, "vLLM warns of this"
        self.resolvers[resolver_name] = resolver

    def get_resolver(self, resolver_name: str) -> LoRAResolver:
        return self.resolvers[resolver_name]


LoRAResolverRegistry = _LoRAResolverRegistry()
