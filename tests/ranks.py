"""Processes of a gloo group, started once and handed one function after the other.

A function is given by name, so that a rank can import it: one of a test module, not a closure. It runs in ranks 0 to
``world`` - 1 with their group, and what it returns, or raises, comes back by rank.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SIZE = 4
_LOST = 100.0  # seconds after which ranks that say nothing are given up
_PATIENCE = timedelta(seconds=30)  # of a collective; longer than any rank may lag behind


class Rank(NamedTuple):
    """What a function knows of where it runs."""

    rank: int
    group: dist.ProcessGroup
    world: int


class Raised(NamedTuple):
    """What a rank raised."""

    kind: str
    message: str
    text: str  # with where


class _Processes:
    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        pipes = [context.Pipe() for _ in range(SIZE)]
        store = os.path.join(self.folder.name, "store")
        self.connections = [here for here, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, store, there), daemon=True)
            for rank, (_, there) in enumerate(pipes)
        ]
        for process, (_, there) in zip(self.processes, pipes, strict=True):
            process.start()
            there.close()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.folder.cleanup()


class Ranks:
    """The processes start at the first call, and again only after some have died or hung."""

    _running: _Processes | None = None

    @classmethod
    def stop(cls) -> None:
        if cls._running is not None:
            cls._running.stop()
            cls._running = None

    def results(self, world: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """By rank; a :class:`Raised` where a rank raised."""
        if Ranks._running is None:
            Ranks._running = _Processes()
        connections = Ranks._running.connections[:world]
        call = pickle.dumps((world, function, args, kwargs))
        for connection in connections:
            connection.send_bytes(call)
        waiting = {connection: rank for rank, connection in enumerate(connections)}
        found: list[Any] = [None] * world
        deadline = time.monotonic() + _LOST
        while waiting:
            ready = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0.0))
            if not ready:
                self.stop()
                raise AssertionError(f"ranks {sorted(waiting.values())} of {world} hang in {function.__name__}")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    found[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    self.stop()
                    raise AssertionError(f"rank {rank} of {world} died in {function.__name__}") from None
        return found

    def __call__(self, world: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """By rank; none may raise."""
        found = self.results(world, function, *args, **kwargs)
        texts = [f"rank {i} of {world}: {result.text}" for i, result in enumerate(found) if isinstance(result, Raised)]
        if texts:  # the ranks may be out of step
            self.stop()
            raise AssertionError("\n".join(texts))
        return found

    def errors(self, world: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Raised]:
        """By rank; all have to raise."""
        found = self.results(world, function, *args, **kwargs)
        for rank, result in enumerate(found):
            assert isinstance(result, Raised), f"rank {rank} of {world} raised nothing, and returned {result!r}"
        return found


def _serve(rank: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE, timeout=_PATIENCE)
    groups = {world: dist.new_group(list(range(world)), timeout=_PATIENCE) for world in range(1, SIZE + 1)}
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:  # the tests are over
            return
        try:
            world, function, args, kwargs = pickle.loads(call)
            result = function(Rank(rank, groups[world], world), *args, **kwargs)
        except Exception as error:
            text = "".join(traceback.format_exception(error)[-12:])
            result = Raised(type(error).__name__, str(error), text)
        connection.send_bytes(pickle.dumps(result))
