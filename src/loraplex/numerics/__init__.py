"""Products, roundings and decompositions that the methods and the exports are built on."""
