"""Signatures of SGLang 0.5.23."""

import json
import os
from typing import Any


class LoRAConfig:
    """An adapter's config."""

    def __init__(
        self,
        path: str | None = None,
        config_dict: dict[str, Any] | None = None,
        added_tokens_config: dict[str, Any] | None = None,
        base_vocab_size: int | None = None,
    ) -> None:
        self.path = path
        if config_dict is None:
            assert path is not None
            with open(os.path.join(path, "adapter_config.json")) as file:
                config_dict = json.load(file)
        self.r = config_dict["r"]
        self.base_vocab_size = base_vocab_size
