"""Tests that measure time run when nothing else does."""

import pytest


@pytest.fixture(autouse=True)
def undisturbed(alone: None) -> None:
    pass
