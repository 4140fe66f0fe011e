"""Jobs that run at the same time on the same data: the same bits as one after the other, and nothing left over."""

import shutil
from contextlib import suppress

import pytest

from jobs.tasks import audit
from pixart.config.recipe import Recipe
from tests.attack.campaign import campaign, is_long
from tests.attack.killed_jobs import JOBS, compare, leftovers, reset, results, run_latents, undisturbed
from tests.attack.test_kills import wait
from tests.support import ranks

pytestmark = pytest.mark.slow
NAMES = ("caption", "latents", "audit", "adopt") if is_long() else ("latents",)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_job_twice_at_once(name, small_recipe: Recipe, tmp_path, record_property):
    attack = campaign(f"{name} twice at once", short=1, long=8)
    job = JOBS[name]
    template, folder, expected = undisturbed(job, small_recipe, tmp_path, num_ranks=1)
    for number in range(attack.tries):
        reset(template, folder)
        attack.figures.tries += 1
        processes = [process for _ in range(2) for process in ranks.start(1, job.function, str(folder))]
        if (codes := wait(processes)) != [0, 0]:
            attack.wrong(f"{name}, {number}", f"ended with {codes}")
        else:
            compare(attack, f"{name}, {number}", job, folder, expected)
    attack.finish(record_property)


def test_audits_while_latents_are_written(small_recipe: Recipe, tmp_path, record_property):
    """An audit of an incomplete dataset is refused or reports what is there; the one after the end is as without it."""
    attack = campaign("audits while latents run", short=1, long=5)
    template, folder = tmp_path / "template", tmp_path / "work"
    folder.mkdir()
    JOBS["latents"].prepare(small_recipe, folder)
    shutil.copytree(folder, template)
    ranks.run(1, run_latents, str(folder))
    audit.run(str(folder))
    expected = results(folder, JOBS["latents"]), results(folder, JOBS["audit"])
    for number in range(attack.tries):
        reset(template, folder)
        (process,) = ranks.start(1, run_latents, str(folder))
        while process.is_alive():
            attack.attempt(f"audit {attack.figures.tries}", lambda: audit.run(str(folder)))
        with suppress(FileNotFoundError):
            shutil.rmtree(folder / "data" / "audit")
        audit.run(str(folder))
        if wait([process]) != [0]:
            attack.wrong(f"{number}", f"latents ended with {process.exitcode}")
        elif (results(folder, JOBS["latents"]), results(folder, JOBS["audit"])) != expected:
            attack.wrong(f"{number}", "the results have other bits")
        elif left := leftovers(folder):
            attack.wrong(f"{number}", f"left over: {left[:5]}")
    assert attack.figures.tries >= attack.tries
    attack.finish(record_property)
