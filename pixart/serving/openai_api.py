"""Answers in the form of OpenAI's API: errors, images, models, and server-sent events."""

import base64
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse

from pixart.serving.requests import ImageRequest, RequestError, ServedModel

ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
PARTIAL, COMPLETED = "image_generation.partial_image", "image_generation.completed"


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return the JSON of an error; its type follows from the HTTP status."""
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Return the response of an error."""
    return JSONResponse(error_body(status, message, param=param, code=code), status, headers)


def read_json(body: bytes) -> Any:
    """Return the value of a JSON text. Raises RequestError for any other text."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON number")

    try:
        return json.loads(body.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise RequestError(f"the body is not JSON: {reason}", code="invalid_json") from None


def image_settings(request: ImageRequest) -> dict[str, Any]:
    """Return the fields of an answer that are the same for all images of a request."""
    width, height = request.size
    return {"size": f"{width}x{height}", "output_format": "png", "background": "opaque", "quality": "auto"}


def images_body(request: ImageRequest, images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the answer to a request for images, whose entries `image_entry` returns."""
    settings = {"steps": request.steps, "guidance": request.guidance, "weights": request.weights}
    return {"created": int(time.time()), "data": list(images), **image_settings(request), **settings}


def image_entry(request: ImageRequest, index: int, batch_size: int, revised_prompt: str | None) -> dict[str, Any]:
    """Return the fields of one image beside its data; `prompt` is the client's, also where another was sampled.

    `batch_size` is the largest number of images that it was computed together with, itself included; only an image with
    1 has exactly the bits of one that `sample` makes alone.
    """
    return {
        "prompt": request.prompt,
        "revised_prompt": revised_prompt,
        "seed": request.seed + index,
        "batch_size": batch_size,
    }


def base64_text(png: bytes) -> str:
    """Return a file in base64."""
    return base64.b64encode(png).decode("ascii")


def event(kind: str, fields: Mapping[str, Any]) -> bytes:
    """Return a server-sent event whose data is JSON."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


def models_body(model: ServedModel, created: int) -> dict[str, Any]:
    """Return the list of the one model that is served, with what its requests may choose."""
    width, height = model.size
    entry = {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "pixart-suite",
        "stage": model.stage,
        "size": f"{width}x{height}",
        "steps": model.steps,
        "guidance": model.guidance,
        "weights": list(model.weights),
        "recaption": model.recaption,
        "num_classes": model.num_classes,
        "classes": list(model.classes),
    }
    return {"object": "list", "data": [entry]}
