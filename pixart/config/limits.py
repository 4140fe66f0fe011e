"""Limits that configurations hold their values against."""

import math


def require_at_least(least: float, **values: float) -> None:
    """Raises ValueError for the first value that is smaller, or no finite number."""
    for name, value in values.items():
        if not value >= least:
            raise ValueError(f"{name}={value}: must be at least {least}")
        if math.isinf(value):
            raise ValueError(f"{name}={value}: must be finite")
        if value >= 2**63:
            raise ValueError(f"{name}={value}: must be less than 2**63")


def require_share(**values: float) -> None:
    """Raises ValueError for the first value that is no share."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value}: must lie between 0 and 1")
