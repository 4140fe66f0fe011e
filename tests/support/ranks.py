"""Ranks of training as processes on this machine, forked from a process that has already imported everything."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["pixart.training.loop", "pixart.data.encoders.text_encoder", "jobs.tracking.mlflow_store"]
)


def start(world: int, function: Callable[..., None], *arguments: Any, nodes: int = 1) -> list[BaseProcess]:
    """Start a function of a module's top level in `world` processes, with the ranks of `nodes` nodes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        environment = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world // nodes}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        process = CONTEXT.Process(target=call, args=(environment, function, arguments))
        process.start()
        processes.append(process)
    return processes


def call(environment: dict[str, Any], function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Set the environment variables of a rank and call its function."""
    import torch

    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    function(*arguments)


def run(world: int, function: Callable[..., None], *arguments: Any, nodes: int = 1) -> None:
    """Start the ranks as `start` does, and assert that all of them succeed within 300 seconds each."""
    processes = start(world, function, *arguments, nodes=nodes)
    for process in processes:
        process.join(300)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in processes] == [0] * world
