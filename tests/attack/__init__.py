"""The attack on the suite as tests: hostile values in every place that takes them, and what must hold for each.

Each test makes a few tries, or with PIXART_ATTACK=long (`make attack`) many, from a seed, and reports its figures,
which the end of the run prints by area.
"""
