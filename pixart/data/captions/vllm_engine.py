"""vLLM's engine, for captions and for recaptioning."""

import atexit
import os
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import wait
from queue import Queue
from threading import Thread
from typing import Any

SOCKETS = "VLLM_RPC_BASE_PATH"
LONG = 50  # letters of a folder's name; with a socket's own it may have 107
MAX_MODEL_LEN = 1024  # tokens: instruction, image and caption


def make_engine(model: str, **settings: Any) -> Any:
    """A `vllm.LLM`; where its process dies, whoever waits for an answer hears of it."""
    import vllm
    from vllm.platforms import current_platform

    if not current_platform.is_cuda_alike():
        settings |= on_a_cpu()
    if SOCKETS not in os.environ:
        os.environ[SOCKETS] = own_folder()
    engine = vllm.LLM(model=model, max_model_len=MAX_MODEL_LEN, **settings)
    core: Any = engine.llm_engine.engine_core
    if hasattr(core, "outputs_queue"):  # it has a process
        sentinels = [process.sentinel for process in core.resources.engine_manager.processes]
        Thread(target=tell_of_end, args=(sentinels, core.outputs_queue), daemon=True).start()
    return engine


def own_folder() -> str:
    """For the sockets of this process's engines, which vLLM leaves behind; it goes with the process."""
    place = tempfile.gettempdir()
    folder = tempfile.TemporaryDirectory(prefix="vllm-", dir=place if len(place) < LONG else "/tmp")
    atexit.register(folder.cleanup)
    return folder.name


def tell_of_end(sentinels: Sequence[Any], answers: Queue) -> None:
    """vLLM itself notices that the process is gone, and leaves those who wait for its answer to wait for ever."""
    from vllm.v1.engine.exceptions import EngineDeadError

    wait(sentinels)
    answers.put(EngineDeadError())


def on_a_cpu() -> dict[str, Any]:
    """The engine's settings where there is no GPU; sets the number of its threads in the environment, where it looks.

    There are no graphs, and compiling takes long. Others need memory, or the engine refuses to start. And others need
    a processor: one is left to those that decode, and engine and model share a process. As the two processes that vLLM
    makes of them on a CPU, each polls for the other's word without a pause.
    """
    import torch
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    threads = min(torch.get_num_threads(), len(os.sched_getaffinity(0)) - 1)
    os.environ["OMP_NUM_THREADS"] = str(max(1, threads))
    return {"enforce_eager": True, "gpu_memory_utilization": 0.5, "distributed_executor_backend": UniProcExecutor}
