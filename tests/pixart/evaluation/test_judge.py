"""The judge on a real vLLM engine: probabilities against a plain sum over the whole vocabulary, and captions."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.vllm_fixture import ROOT, VARIABLES, needs_vllm

pytestmark = [pytest.mark.vllm, needs_vllm]
SCRIPT = """
import json, math, sys
import numpy as np
from PIL import Image
import vllm
from pixart.config.captions import CaptionsConfig
from pixart.evaluation.judge import INSTRUCTION, Judge
from pixart.evaluation.prompt_following import Question, normalized

judge = Judge(sys.argv[1], CaptionsConfig(max_tokens=8))
random = np.random.default_rng(0)
images = [Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(2)]
answers = ["yes", "no", "two", "red", "tall", "hippopotamus"]
questions = [Question(text=f"Is it {word}?", answer=word, skill="s") for word in answers]
judged = judge.answer(images, [questions, questions[:3]])
results = []
size = len(judge._tokenizer)
for image, several, answered in zip(images, (questions, questions[:3]), judged):
    for question, judgement in zip(several, answered):
        prompt = judge.prompt(
            [{"type": "image"}, {"type": "text", "text": f"{question.text} {INSTRUCTION}"}], image
        )
        probability, total = 0.0, 0.0
        for begin in range(0, size, 100):
            ids = list(range(begin, min(begin + 100, size)))
            settings = vllm.SamplingParams(temperature=0, max_tokens=1, logprob_token_ids=ids)
            output = judge._engine.generate([prompt], settings, use_tqdm=False)[0].outputs[0]
            for index in ids:
                value = math.exp(output.logprobs[0][index].logprob)
                total += value
                if normalized(judge._tokenizer.decode([index])) == question.answer:
                    probability += value
        results.append([question.answer, judgement.probability, judgement.answer, probability, total])
print("RESULT " + json.dumps({"results": results, "captions": judge.describe(images)}))
"""


def test_probabilities_are_those_of_the_vocabulary(vllm_environment: Path, answering_qwen: Path):
    environment = os.environ | VARIABLES | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [vllm_environment, "-c", SCRIPT, answering_qwen], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    output = json.loads(line.removeprefix("RESULT "))
    assert len(output["results"]) == 9
    judged = 0
    for answer, probability, token, plain, total in output["results"]:
        assert total == pytest.approx(1, abs=1e-3)
        limited = {"yes": ("yes", "no"), "no": ("yes", "no"), "two": ("two",)}.get(answer)
        if answer == "hippopotamus":
            assert probability is None  # no single token
        elif probability is None:
            assert limited
            assert token.strip().lower() not in limited
        else:
            judged += 1
            assert probability == pytest.approx(plain, rel=1e-3)
    assert judged >= 2
    assert len(output["captions"]) == 2
