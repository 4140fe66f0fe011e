"""Rewriting of requests in the style of the training captions, by an OpenAI-compatible server.

Neither a slow nor a hostile server holds up more than NUM_THREADS requests at once, each for a bounded time.
"""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from pixart.config.captions import CaptionsConfig
from pixart.data.captions.rewriting import Generate, Rewritten, rewrite, server_generator
from pixart.data.captions.vllm_engine import context_length

logger = logging.getLogger(__name__)
NUM_THREADS = 8
GPU_MEMORY_SHARE = "0.4"  # of a GPU that vLLM shares with the served model
START_SECONDS = 600.0  # until the vLLM server answers
STOP_SECONDS = 10.0  # between SIGTERM and SIGKILL
MAX_PROMPT_CHARACTERS = 4000  # of a rewritten prompt; a longer one is not used


class RecaptionError(Exception):
    """The prompt could not be rewritten; the message says why."""


class Recaptioner:
    """Rewrites prompts with a model that `connect` returns; it is called with the first prompt."""

    def __init__(self, captions: CaptionsConfig, connect: Callable[[], Generate]) -> None:
        self.captions, self.connect = captions, connect
        self.threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="recaption")
        self.places = asyncio.Semaphore(NUM_THREADS)
        self.generate: Generate | None = None
        self.connecting = threading.Lock()

    async def rewrite(self, prompt: str, seconds: float) -> Rewritten:
        """Return the rewritten prompt, or the unchanged one with the problem of the answer.

        Raises RecaptionError if the server does not answer within `seconds`, or not as the API demands.
        """
        try:
            async with asyncio.timeout(seconds):
                await self.places.acquire()
                future = asyncio.get_running_loop().run_in_executor(self.threads, self.rewrite_now, prompt)
                future.add_done_callback(lambda done: self.release(done))
                return await asyncio.shield(future)
        except TimeoutError:
            raise RecaptionError(f"the model that rewrites prompts did not answer within {seconds:.0f} s") from None
        except ValueError as error:
            logger.warning("recaption: %s", error)
            raise RecaptionError("the model that rewrites prompts failed; see the server's log") from None

    def release(self, done: "asyncio.Future[Rewritten]") -> None:
        """Give the place back once the thread has ended, which may be after the request's time limit."""
        self.places.release()
        if not done.cancelled():
            done.exception()  # the request may have ended before; asyncio reports an exception that nobody reads

    def rewrite_now(self, prompt: str) -> Rewritten:
        """Rewrite a prompt, in a thread. Raises ValueError if the server fails."""
        with self.connecting:
            self.generate = self.generate or self.connect()
        (rewritten,) = rewrite([prompt], self.captions, self.generate)
        if len(rewritten.text) > MAX_PROMPT_CHARACTERS:
            return Rewritten(request=prompt, text=prompt, problem="too long")
        return rewritten

    def close(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)


def by_server(captions: CaptionsConfig, url: str, model: str | None, *, seconds: float) -> Recaptioner:
    """Return a recaptioner that asks a running server at `http://host:port/v1`, each time for at most `seconds`."""
    return Recaptioner(captions, lambda: server_generator(url.rstrip("/"), model, seconds=seconds, max_attempts=1))


class VllmServer:
    """A vLLM server in a process of its own, on a free port of this machine; its output is appended to `log`.

    `stop` ends the process and its children.
    """

    def __init__(self, python: str, model: str, captions: CaptionsConfig, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        length = context_length(captions.rewrite_instruction, captions.max_tokens)
        self.command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        self.command += ["--host", "127.0.0.1", "--port", str(self.port), "--max-model-len", str(length)]
        self.command += ["--gpu-memory-utilization", GPU_MEMORY_SHARE, "--enforce-eager"]
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def wait(self) -> None:
        """Wait until the server answers. Raises ValueError if it has ended, or does not answer in time."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ValueError(
                    f"the vLLM server has ended with code {self.process.returncode}; its log is {self.log}"
                )
            with suppress(OSError):
                urllib.request.urlopen(f"{self.url}/models", timeout=5).read()
                return
            time.sleep(1)
        raise ValueError(f"the vLLM server does not answer after {START_SECONDS} s; its log is {self.log}")

    def stop(self) -> None:
        """End the process and all its children."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def by_vllm(captions: CaptionsConfig, server: VllmServer, *, seconds: float) -> Recaptioner:
    """Return a recaptioner that asks a vLLM server beside this process, once it has started."""

    def connect() -> Generate:
        server.wait()
        return server_generator(server.url, seconds=seconds, max_attempts=1)

    return Recaptioner(captions, connect)
