"""Recording what a GPU does as a CUDA graph; a recording that fails leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch

T = TypeVar('T')


def capture(run: Callable[[], T], stream: torch.cuda.Stream | None = None) -> tuple[Any, T]:
    """Record what a function has the current GPU do. To record is not to run: nothing is computed before a replay.

    Args:
        run: Called once. What it waits for or reads on the CPU cannot be recorded.
        stream: The one to record on; by default one of torch's own.

    Returns:
        The graph, and what the function returned.

    Raises:
        Exception: What the function raised, at the first operation that cannot be recorded.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    failure: BaseException | None = None
    try:
        # Other threads may go on meanwhile.
        recording = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode='thread_local')
        with torch.cuda.stream(torch.cuda.current_stream()), recording:
            try:
                return graph, run()
            except BaseException as error:
                failure = error
                raise
    except BaseException as error:
        if error is failure:
            raise
        _recover(pool)  # torch could not end the recording
        if failure is not None:  # of which it says less
            raise failure from failure.__cause__
        raise
    finally:
        failure = None  # its traceback holds this frame, and with it tensors


def _recover(pool: Any) -> None:
    """Put back what torch leaves in the state of recording when it cannot end one.

    The random generator would refuse every draw, and the allocator would wait with all blocks that other streams use.
    What has been recorded before draws from the state that the generator had until now.
    """
    device = torch.cuda.current_device()
    with suppress(AttributeError, RuntimeError):  # another torch has no such functions, or has done this itself
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    generator = torch.cuda.default_generators[device]
    if hasattr(generator, 'graphsafe_set_state'):
        generator.graphsafe_set_state(generator.clone_state())
