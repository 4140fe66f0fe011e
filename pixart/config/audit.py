"""What an audit lets pass."""

from dataclasses import dataclass

from pixart.config.limits import require_share


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditConfig:
    """What a dataset's audit lets pass, as shares of its rows; training refuses what does not pass."""

    max_rejected: float = 0.2  # for whatever reason
    max_plain: float = 0.02  # plain and near-plain
    max_duplicates: float = 0.05  # exact and near ones, the first of each group not counted
    max_same_opening: float = 0.5  # captions that begin with the same three words

    def __post_init__(self) -> None:
        require_share(
            max_rejected=self.max_rejected,
            max_plain=self.max_plain,
            max_duplicates=self.max_duplicates,
            max_same_opening=self.max_same_opening,
        )
