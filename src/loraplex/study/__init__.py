"""loraplex compare: many runs at one budget, and what may be concluded from them."""
