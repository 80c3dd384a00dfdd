"""A stand-in for a CUDA device on the CPU: it does the work, writes down every call, and looks for races.

Work is done at once and in the order of issue, so the tokens are right even where a real device could be late. What a real
device would be free to do is found by vector clocks instead: every tensor that an operator reads or writes is noted with
its stream, and two accesses of one memory, one of them a write, must be ordered by events. Copies to the host arrive only
when the host has waited for them, and memory that a copy still reads must not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Clock = dict[int, int]

#: Operators that wait for the device, or take numbers from the host: none may be in a capture.
FORBIDDEN = {
    f"aten::{name}"
    for name in ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "lift_fresh", "pin_memory", "_pin_memory")
}


class DeviceError(AssertionError):
    """What a real device would have done wrong, or refused."""


@dataclass
class Event:
    number: int
    clock: Clock | None = None


@dataclass
class Memory:
    """Who touched a storage: the last writer, and the readers since."""

    writer: tuple[int, int] | None = None
    readers: Clock = field(default_factory=dict)


class Recorder:
    """A :class:`~ensemble_decode.engine.device.StreamDevice` on CPU tensors. ``log`` holds the calls, as tuples."""

    def __init__(self) -> None:
        self.log: list[tuple] = []
        self.captures: list[list[tuple]] = []
        self._clocks: dict[int, Clock] = {}
        self._host: Clock = {}
        self._memory: dict[int, Memory] = {}
        self._stack: list[int] = []
        self._events = 0
        self._capturing = False
        self._pinned: set[int] = set()
        self._kept: list[torch.Tensor] = []
        self._outgoing: list[tuple[torch.Tensor, torch.Tensor]] = []  # the host's memory, what it was at the copy
        self._incoming: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._mode = _Watch(self)

    # ── streams and events ──────────────────────────────────────────────────────────────────────────────────────────
    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        self.log.append(("on", stream))
        self._stack.append(stream)
        try:
            if len(self._stack) == 1:
                with self._mode:
                    yield
            else:
                yield
        finally:
            self._stack.pop()

    def event(self) -> Event:
        self._not_captured("event")
        self._events += 1
        return Event(self._events - 1)

    def record(self, event: Event, stream: int) -> None:
        self.log.append(("record", stream, event.number))
        event.clock = dict(self._clock(stream))
        self._clock(stream)[stream] += 1

    def wait(self, stream: int, event: Event) -> None:
        self.log.append(("wait", stream, event.number))
        if event.clock is None:
            raise DeviceError(f"stream {stream} waits for event {event.number}, which nobody recorded")
        _merge(self._clock(stream), event.clock)

    def finish(self, event: Event) -> None:
        self._not_captured("finish")
        self.log.append(("finish", event.number))
        if event.clock is None:
            raise DeviceError(f"the host waits for event {event.number}, which nobody recorded")
        _merge(self._host, event.clock)
        self._arrive()

    def synchronize(self) -> None:
        self._not_captured("synchronize")
        self.log.append(("synchronize",))
        for stream, clock in self._clocks.items():
            _merge(self._host, clock)
            clock[stream] += 1
        self._arrive()

    # ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def upload(self, data: Any, *, dtype: torch.dtype) -> torch.Tensor:
        self._not_captured("upload")
        if not hasattr(data, "dtype"):
            return torch.tensor(data, dtype=dtype)
        out = torch.as_tensor(data.copy(), dtype=dtype)
        self._memory.pop(_key(out), None)
        return out

    def pinned(self, num_bytes: int) -> torch.Tensor:
        self._not_captured("pinned")
        out = torch.zeros(num_bytes, dtype=torch.uint8)
        self._kept.append(out)  # so that its address stays its own
        self._pinned.add(_key(out))
        return out

    def buffer(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self._not_captured("buffer")
        return torch.zeros(*shape, dtype=dtype)

    def copy_async(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self._not_captured("copy_async")
        to_host, from_host = (_key(t) in self._pinned for t in (destination, source))
        self.log.append(("copy", "to host" if to_host else "to device"))
        if to_host == from_host:
            raise DeviceError("an asynchronous copy needs pinned memory at one end")
        if from_host:
            destination.copy_(source)
            self._outgoing.append((source, source.clone()))
        else:
            self._incoming.append((destination, source.clone()))
            destination.fill_(-(2**40))  # not there yet

    # ── graphs ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        function()
        start = len(self.log)
        before = {stream: clock[stream] for stream, clock in self._clocks.items()}
        self._capturing = True
        try:
            function()
        finally:
            self._capturing = False
        calls = self.log[start:]
        self.captures.append(calls)
        main = self._stack[-1]
        forked = {call[1] for call in calls if call[0] == "wait"}
        for stream in {call[1] for call in calls if call[0] == "on"} - {main}:
            if stream not in forked:
                raise DeviceError(f"stream {stream} was not forked from the captured one")
            if self._clock(main).get(stream, -1) < before.get(stream, 0):
                raise DeviceError(f"stream {stream} was not joined when the capture ended")
        return function

    def replay(self, graph: Callable[[], None]) -> None:
        self.log.append(("replay",))
        graph()
        self.log.append(("replayed",))

    # ── details ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def _clock(self, stream: int) -> Clock:
        return self._clocks.setdefault(stream, {stream: 0})

    def _arrive(self) -> None:
        for source, copied in self._outgoing:
            if not torch.equal(source, copied):
                raise DeviceError("the host wrote to pinned memory that a copy was reading")
        for destination, value in self._incoming:
            destination.copy_(value)
        self._outgoing.clear()
        self._incoming.clear()

    def _not_captured(self, what: str) -> None:
        if self._capturing:
            raise DeviceError(f"{what} inside a capture")

    def _ordered(self, stream: int, other: int, time: int) -> bool:
        return stream == other or max(self._clock(stream).get(other, -1), self._host.get(other, -1)) >= time

    def touch(self, tensor: torch.Tensor, write: bool, name: str) -> None:
        """Note that the current stream reads or writes a tensor."""
        stream = self._stack[-1]
        memory = self._memory.setdefault(_key(tensor), Memory())
        others = [] if memory.writer is None else [memory.writer]
        if write:
            others += memory.readers.items()
        for other, time in others:
            if not self._ordered(stream, other, time):
                raise DeviceError(f"race: {name} on stream {stream} and an operator on stream {other} are not ordered")
        now = self._clock(stream)[stream]
        if write:
            memory.writer, memory.readers = (stream, now), {}
        else:
            memory.readers[stream] = now

    def fresh(self, tensor: torch.Tensor) -> None:
        """A new tensor: whoever had its memory before is gone."""
        self._memory[_key(tensor)] = Memory((self._stack[-1], self._clock(self._stack[-1])[self._stack[-1]]))


class _Watch(TorchDispatchMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if self._recorder._capturing and name in FORBIDDEN:
            raise DeviceError(f"{name} inside a capture")
        read: set[int] = set()
        for index, argument in enumerate(func._schema.arguments):
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            write = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_leaves(value):
                if isinstance(tensor, torch.Tensor):
                    read.add(_key(tensor))
                    self._recorder.touch(tensor, write, name)
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and _key(tensor) not in read:
                self._recorder.fresh(tensor)
        return out


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _merge(clock: Clock, other: Clock) -> None:
    for stream, time in other.items():
        clock[stream] = max(clock.get(stream, -1), time)
