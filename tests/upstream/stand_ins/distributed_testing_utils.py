"""How transformers' tests start their processes, which its source distribution leaves out: here on CPU, by gloo."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _get_distributed_backend() -> str:
    return "gloo"


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    torch.set_num_threads(1)


def _start_rank_processes(function: Callable[..., None], args: tuple, nprocs: int) -> None:
    mp.spawn(function, args=args, nprocs=nprocs, join=True)


def run_distributed(world_size: int) -> Callable:
    """Make a function of (rank, …) run in so many processes at once."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            with tempfile.TemporaryDirectory() as folder:
                store = Path(folder) / "store"
                _start_rank_processes(run_rank, (world_size, store, function, args, kwargs), world_size)

        return call

    return decorate


def run_rank(rank: int, world_size: int, store: Path, function: Callable[..., None], args: tuple, kwargs: dict) -> None:
    """What one process does."""
    os.environ.update(WORLD_SIZE=str(world_size), RANK=str(rank), LOCAL_RANK=str(rank))
    _set_rank_device(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        function(rank, *args, **kwargs)
    finally:
        dist.destroy_process_group()
