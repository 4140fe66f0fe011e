"""What Slurm says about the jobs of a profile: partition, account, QOS and limits, by `sbatch --test-only`."""

from collections.abc import Iterator
from pathlib import Path

from jobs.commands.doctor.finding import Finding, missing, ok, unknown
from slurm.commands import SlurmUnavailableError
from slurm.executor import Cluster
from slurm.profile import Profile
from slurm.sbatch import Shape, predicted_start

ARRAYS, RANKS = ("caption", "latents"), ("audit", "train", "convert", "sample")


def check(profile: Profile, home: Path) -> Iterator[Finding]:
    """Yield, for each kind of job, when it would start if it were submitted now, or why Slurm would refuse it."""
    if profile.executor == "local":
        yield ok("Slurm", f"the profile {profile.name} needs none, jobs are processes of this machine")
        return
    cluster = Cluster(profile, home / "runs" / "RUN")
    shapes = [cluster.array_shape(kind, range(2)) for kind in ARRAYS]
    shapes += [cluster.ranks_shape(kind, 1, None if kind == "train" else 1) for kind in RANKS]
    for shape in shapes:
        yield answer(cluster, shape)


def answer(cluster: Cluster, shape: Shape) -> Finding:
    """Return what Slurm says about one submission."""
    subject = f"Slurm, {shape.kind}"
    try:
        cluster.check(shape)
        return ok(subject, predicted_start(cluster.sbatch_text(shape)))
    except SlurmUnavailableError as error:
        return unknown(subject, f"{error}; try again later")
    except ValueError as error:
        return missing(subject, f"{error}; correct the profile {cluster.profile.name}")
