"""The device that a runner drives: the few calls in which a CPU and a CUDA device differ.

A runner issues work to numbered streams, orders them by events, captures a step into a graph and replays it, and
copies through pinned memory. :class:`CpuDevice` has none of that; its lanes are worker threads. :class:`CudaDevice` hands each
call to ``torch.cuda``. Tests have a third, which records every call and looks for races.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch

from ensemble_decode.engine.plan import MAIN


class Upload(Protocol):
    """Numbers from the host (a sequence, or a NumPy array) as a tensor on the device, without waiting.

    The type is always asked for: what it would be inferred from, an empty list or whole numbers where fractions are meant,
    says nothing about what the numbers are for.
    """

    def __call__(self, data: Any, *, dtype: torch.dtype) -> torch.Tensor: ...


class Device(Protocol):
    """What the runner asks of every device."""

    @property
    def upload(self) -> Upload: ...

    def on(self, stream: int) -> AbstractContextManager[Any]:
        """Issue to ``stream`` what the block computes."""
        ...

    def synchronize(self) -> None:
        """Let the host wait for everything."""
        ...


@runtime_checkable
class StreamDevice(Device, Protocol):
    """A device whose lanes are streams, and that captures decode steps. What it calls streams are numbers."""

    def event(self) -> Any: ...

    def record(self, event: Any, stream: int) -> None: ...

    def wait(self, stream: int, event: Any) -> None:
        """Let ``stream`` wait for ``event``; the host goes on."""
        ...

    def finish(self, event: Any) -> None:
        """Let the host wait for ``event``."""
        ...

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Zeroed host memory, uint8, that asynchronous copies can use."""
        ...

    def buffer(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Zeroed device memory that outlives every step."""
        ...

    def copy_async(self, destination: torch.Tensor, source: torch.Tensor) -> None: ...

    def capture(self, function: Callable[[], None]) -> Any:
        """A graph of what ``function`` issues on the main stream and those that fork from it."""
        ...

    def replay(self, graph: Any) -> None: ...


class CpuDevice:
    """No streams, no graphs: only what the common path of the runner asks for."""

    def upload(self, data: Any, *, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(data, dtype=dtype)

    def on(self, stream: int) -> AbstractContextManager[None]:
        return nullcontext()

    def synchronize(self) -> None:
        pass


class CudaDevice:
    """One CUDA device and its streams. (Not run on hardware yet.)"""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams: dict[int, torch.cuda.Stream] = {}
        #: One pool of memory for all graphs: they never run at the same time.
        self._pool = torch.cuda.graph_pool_handle()

    def _stream(self, number: int) -> torch.cuda.Stream:
        if number not in self._streams:
            self._streams[number] = torch.cuda.Stream(self.device)
        return self._streams[number]

    def upload(self, data: Any, *, dtype: torch.dtype) -> torch.Tensor:
        host = torch.as_tensor(data, dtype=dtype)
        # The allocator of pinned memory keeps the block until the copy is done.
        return host.pin_memory().to(self.device, non_blocking=True)

    def on(self, stream: int) -> AbstractContextManager[None]:
        return torch.cuda.stream(self._stream(stream))

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event()

    def record(self, event: torch.cuda.Event, stream: int) -> None:
        event.record(self._stream(stream))

    def wait(self, stream: int, event: torch.cuda.Event) -> None:
        self._stream(stream).wait_event(event)

    def finish(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)

    def buffer(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=self.device)

    def copy_async(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        destination.copy_(source, non_blocking=True)

    def capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        # What is compiled, tuned or allocated at the first call must be so before the capture.
        for _ in range(2):
            function()
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads (a server's) may call CUDA meanwhile.
        with torch.cuda.graph(graph, self._pool, self._stream(MAIN), capture_error_mode="thread_local"):
            function()
        return graph

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        graph.replay()


def device_of(tensor: torch.Tensor) -> Device:
    """The device that a pool lies on."""
    return CudaDevice(tensor.device) if tensor.is_cuda else CpuDevice()
