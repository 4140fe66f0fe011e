"""The vLLM engine that captions images and rewrites prompts."""

import atexit
import os
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import wait
from queue import Queue
from threading import Thread
from typing import Any

SOCKET_FOLDER_VARIABLE = "VLLM_RPC_BASE_PATH"
MAX_TMPDIR_LENGTH = 50  # characters; the path of a Unix socket is limited to 107
CONTEXT_LENGTH = 1024  # tokens: instruction, image and caption
IMAGE_TOKENS = 320  # of an image of the largest size, and of the chat template around it
BYTES_PER_TOKEN = 2  # at least, of an instruction; texts in Latin script have about 4


def context_length(instruction: str, max_tokens: int) -> int:
    """Return the context length, in tokens, that an instruction, an image and an answer of `max_tokens` fit into."""
    return max(CONTEXT_LENGTH, IMAGE_TOKENS + len(instruction.encode()) // BYTES_PER_TOKEN + max_tokens)


def make_engine(model: str, *, max_model_len: int, **settings: Any) -> Any:
    """Create a `vllm.LLM` that raises EngineDeadError in waiting callers if its process dies.

    `max_model_len` is the length of its context, in tokens.
    """
    import vllm
    from vllm.platforms import current_platform

    if not current_platform.is_cuda_alike():
        settings |= cpu_settings()
    if SOCKET_FOLDER_VARIABLE not in os.environ:
        os.environ[SOCKET_FOLDER_VARIABLE] = make_socket_folder()
    engine = vllm.LLM(model=model, max_model_len=max_model_len, **settings)
    core: Any = engine.llm_engine.engine_core
    if hasattr(core, "outputs_queue"):  # the engine runs in a separate process
        sentinels = [process.sentinel for process in core.resources.engine_manager.processes]
        Thread(target=report_engine_death, args=(sentinels, core.outputs_queue), daemon=True).start()
    return engine


def make_socket_folder() -> str:
    """Create a folder for the engine's sockets, which vLLM does not delete, and remove it when the process exits."""
    place = tempfile.gettempdir()
    folder = tempfile.TemporaryDirectory(prefix="vllm-", dir=place if len(place) < MAX_TMPDIR_LENGTH else "/tmp")
    atexit.register(folder.cleanup)
    return folder.name


def report_engine_death(sentinels: Sequence[Any], outputs: Queue) -> None:
    """Queue an EngineDeadError when an engine process exits.

    vLLM itself detects the exit, but leaves callers that wait for an output blocked.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    wait(sentinels)
    outputs.put(EngineDeadError())


def cpu_settings() -> dict[str, Any]:
    """Return the engine settings for a machine without a GPU, and set OMP_NUM_THREADS for its threads.

    Compilation is skipped, as it takes long and there are no CUDA graphs. Half of the memory and one core are left to
    the decoding threads; without free memory the engine refuses to start. The uniprocess executor is used because the
    engine and worker processes that vLLM creates on a CPU busy-wait for each other.
    """
    import torch
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    threads = min(torch.get_num_threads(), len(os.sched_getaffinity(0)) - 1)
    os.environ["OMP_NUM_THREADS"] = str(max(1, threads))
    return {"enforce_eager": True, "gpu_memory_utilization": 0.5, "distributed_executor_backend": UniProcExecutor}
