"""The examples of docs/serving.md run as they are written, but for the port."""

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[3] / "docs/serving.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_example_of_curl(text_server):
    (command,) = re.findall(r"^    (curl (?:.*\\\n)*.*)$", PAGE, re.MULTILINE)
    assert ADDRESS in command
    command = command.replace(ADDRESS, text_server.url)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    images = json.loads(done.stdout)["data"]
    assert [image["seed"] for image in images] == [7, 8]
    assert urllib.request.urlopen(images[0]["url"]).read().startswith(b"\x89PNG")


def test_the_example_of_the_openai_client(text_server, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert ADDRESS in code
    code = code.replace(ADDRESS, text_server.url)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7.png", "8.png"]
    assert done.stdout.count("image_generation.partial_image") == 3
    assert done.stdout.count("image_generation.completed") == 1
