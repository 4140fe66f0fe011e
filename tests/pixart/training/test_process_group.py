"""Logging of the ranks."""

import re
import subprocess
import sys

CODE = """
import logging
from pixart.training.process_group import configure_logging
configure_logging(3)
logger = logging.getLogger("pixart.training.metrics")
logger.info("step 1/2  loss 0.5")
logger.warning("step 2: update skipped")
logging.getLogger("another.package").info("not logged")
"""
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"


def test_log_lines_have_time_level_and_rank():
    """Progress goes to stdout, warnings to stderr, and information of other packages nowhere."""
    process = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert re.fullmatch(TIME + r" INFO rank 3: step 1/2  loss 0\.5\n", process.stdout)
    assert re.fullmatch(TIME + r" WARNING rank 3: step 2: update skipped\n", process.stderr)
