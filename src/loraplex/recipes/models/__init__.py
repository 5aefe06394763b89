"""Base models, from wherever a run names them."""

from loraplex.recipes.models.loading import load_model

__all__ = ["load_model"]
