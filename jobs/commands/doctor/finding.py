"""One line of the doctor's report."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What the doctor found about a subject: ok, missing (jobs would fail), or unknown (it could not be checked)."""

    state: Literal["ok", "missing", "unknown"]
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.state:<8} {self.subject}: {self.text}"


def ok(subject: str, text: str) -> Finding:
    return Finding(state="ok", subject=subject, text=text)


def missing(subject: str, text: str) -> Finding:
    return Finding(state="missing", subject=subject, text=text)


def unknown(subject: str, text: str) -> Finding:
    return Finding(state="unknown", subject=subject, text=text)
