"""Tests that measure time run only when no other worker runs tests."""

import pytest


@pytest.fixture(autouse=True)
def undisturbed(alone: None) -> None:
    pass
