import pytest

from slurm import profile as profiles


def test_shipped_profiles_load(monkeypatch):
    monkeypatch.setenv("SLURM_ACCOUNT", "group")
    monkeypatch.setenv("PIXART_MAIL", "someone@example.org")
    assert profiles.load("local").executor == "local"
    b200 = profiles.load("hpg-b200")
    assert (b200.gpus_per_node, b200.gpu_type, b200.account) == (8, "b200", "group")


def test_missing_environment_variable_is_named(monkeypatch):
    monkeypatch.delenv("SLURM_ACCOUNT", raising=False)
    with pytest.raises(ValueError, match="account needs the environment variable SLURM_ACCOUNT"):
        profiles.load("hpg-b200")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('executor = "local"\ngpu = 3', "unknown key 'gpu'"),
        ('executor = "pbs"', "executor = 'pbs' must be one of local, slurm"),
        ('executor = "slurm"\ngpus_per_node = "8"', "gpus_per_node = '8' must be of type int"),
        ('executor = "slurm"\ngpus_per_node = true', "gpus_per_node = True must be of type int"),
        ('executor = "slurm"\narray_parallelism = -1', "array_parallelism = -1 must not be negative"),
        ('executor = "slurm"\nsetup = "module load"', "setup = 'module load' must be of type list"),
        ('executor = "slurm"\n[minutes]\ntrain = "1"', "minutes.train = '1' must be of type int"),
        ('executor = "slurm"\n[minutes]\ntrian = 1', "minutes.trian is not a job kind"),
        ('executor = "slurm"\nname = "x"', "unknown key 'name'"),
        ("partition = 'a'", "'executor' is missing"),
        ("executor = ", "profile"),
    ],
)
def test_errors_name_the_key(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        profiles.load(str(path))
    assert "\n" not in str(caught.value)


def test_unknown_profile_error_lists_the_profiles():
    with pytest.raises(ValueError, match=r"'nowhere'.*hpg-b200, local"):
        profiles.load("nowhere")


def test_default(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("PIXART_CLUSTER", raising=False)
    assert profiles.default_name() == "local"
    monkeypatch.setenv("PIXART_CLUSTER", "mine")
    assert profiles.default_name() == "mine"
    monkeypatch.delenv("PIXART_CLUSTER")
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    with pytest.raises(ValueError, match="PIXART_CLUSTER"):
        profiles.default_name()
