"""The attack on the suite as tests: hostile values in every place that takes them, and what must hold for each.

Each test makes as many tries as PIXART_ATTACK_TRIES says for it (`make attack` sets it), from a seed, and reports its
figures, which the end of the run prints by area.
"""
