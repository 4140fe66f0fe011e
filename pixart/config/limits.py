"""Checks that the configuration's dataclasses share."""

import math

INT64_END = 2**63


def require_at_least(least: float, **values: float) -> None:
    """Raise ValueError for the first value that is not a finite number of at least `least` and below 2**63."""
    for name, value in values.items():
        if not value >= least:
            raise ValueError(f"{name}={value}: must be at least {least}")
        if math.isinf(value):
            raise ValueError(f"{name}={value}: must be finite")
        if value >= INT64_END:
            raise ValueError(f"{name}={value}: must be less than 2**63")


def require_positive(**values: float) -> None:
    """Raise ValueError for the first value that is not a finite number of more than 0."""
    for name, value in values.items():
        require_at_least(0, **{name: value})
        if value == 0:
            raise ValueError(f"{name}={value}: must be more than 0")


def require_fraction(**values: float) -> None:
    """Raise ValueError for the first value that is not between 0 and 1, both included."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value}: must lie between 0 and 1")
