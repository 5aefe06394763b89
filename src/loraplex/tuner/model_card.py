"""The model card beside a saved adapter: what a reader has to import."""

from __future__ import annotations

import os

from huggingface_hub import ModelCard, ModelCardData

_MARK = "<!-- loraplex: how to load -->"


def say_how_to_load(folder: str, title: str, tag: str) -> None:
    """Add to the card in `folder`, once, how an adapter of the method `title` is loaded; write one if there is none.

    PEFT can't load the type without the import and ends in a bare KeyError: the card is where people look.
    """
    path = os.path.join(folder, "README.md")
    card = ModelCard.load(path) if os.path.isfile(path) else ModelCard.from_template(ModelCardData())
    if _MARK not in card.text:
        card.data["tags"] = sorted({*(card.data.get("tags") or []), "loraplex", tag})
        card.text += (
            f"\n\n{_MARK}\n## How to load\n\n"
            f"The method of this adapter is {title}. `pip install loraplex`, then:\n\n"
            "```python\nimport loraplex  # registers the adapter's type with PEFT\n"
            "from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base_model, adapter)\n```\n"
        )
        card.save(path)
