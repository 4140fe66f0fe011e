"""A command that Slurm refuses leaves no folder: neither of the submission nor of a run."""

import pytest

from jobs import launch

PROFILE = 'executor = "slurm"\npoll_seconds = 1\n'
SINFO = "echo 'main*|infinite|n1|gpu:0'"


@pytest.mark.parametrize("command", ["audit", "verify"])
def test_a_refused_command_leaves_no_submission(small_recipe, programs, tmp_path, capsys, command):
    programs(sinfo=SINFO, sbatch="echo 'sbatch: error: Invalid account' >&2; exit 1", scontrol="true", squeue="true")
    (tmp_path / "own.toml").write_text(PROFILE)
    home = tmp_path / "home"
    common = ["--home", str(home), "--cluster", str(tmp_path / "own.toml"), "--dataset", small_recipe.data.path]
    assert launch.main([command, *common]) == 2
    assert "Invalid account" in capsys.readouterr().err
    assert not list(home.glob("runs/*"))
    assert not list(home.glob("submissions/*"))
