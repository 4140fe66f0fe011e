"""The attack on the suite as tests: hostile values in every place that takes them, and what must hold for each.

Each test makes a few tries, or with PIXART_ATTACK=long (`make attack`) many, from a seed, and reports its figures. The
end of the run prints them by area.
"""
