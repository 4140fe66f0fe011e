"""Programs that stand in for those of a cluster."""

import pytest


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """Callable that puts programs, as shell scripts by name, before all others."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def write(**scripts: str) -> None:
        for name, script in scripts.items():
            path = tmp_path / name
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)

    return write
