"""Configuration of a dataset's audit."""

from dataclasses import dataclass

from pixart.config.limits import require_fraction


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditConfig:
    """Limits that a dataset must meet to pass its audit; training requires a passed audit.

    Raises ValueError naming the field for a limit that is not a fraction.
    """

    max_rejected: float = 0.2
    """Largest fraction of all rows that may be rejected, for any reason."""

    max_plain: float = 0.02
    """Largest fraction of all rows that may be rejected as plain or near-plain."""

    max_duplicates: float = 0.05
    """Largest fraction of the valid rows that may be exact or near duplicates; the first image of each group is not
    counted."""

    max_same_opening: float = 0.5
    """Largest fraction of the valid rows whose captions may begin with the same three words."""

    def __post_init__(self) -> None:
        require_fraction(
            max_rejected=self.max_rejected,
            max_plain=self.max_plain,
            max_duplicates=self.max_duplicates,
            max_same_opening=self.max_same_opening,
        )
