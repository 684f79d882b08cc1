"""The server: uvicorn over the application, which on SIGTERM takes nothing new and lets what runs end."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from deltaw.errors import ConfigError, Fault
from deltaw.serve.http.app import Draining, create_app

if TYPE_CHECKING:
    from deltaw.serve.service import Service

LOOK_S = 0.05


class Server(uvicorn.Server):
    """uvicorn that drains before it shuts down; a second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, service: Service, draining: Draining) -> None:
        super().__init__(config)
        self.service, self.draining = service, draining

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain at the first signal."""
        if self.draining.begun or sig == signal.SIGINT:
            self.draining.begun = True
            super().handle_exit(sig, frame)
            return
        self.draining.begun = True
        asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        """Wait for the answers under way, at most as long as is allowed, then shut down."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self.service.config.drain
        while not self.service.engine.scheduler.idle and loop.time() < end:
            await asyncio.sleep(LOOK_S)
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; ConfigError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise ConfigError(Fault("--port", f"{host}:{port} cannot be used ({error.strerror})", "a free port",
                                "Choose another with --port, or 0 for any")) from error
    return found


def serve(service: Service, opened: socket.socket, on_ready: Callable[[], None] = lambda: None) -> None:
    """Answer requests until the process is asked to stop."""
    draining = Draining()
    config = uvicorn.Config(create_app(service, draining), log_level="warning", access_log=False, lifespan="off",
                            timeout_graceful_shutdown=2, timeout_keep_alive=30, server_header=False)
    server = Server(config, service, draining)
    opened.listen(2048)
    on_ready()
    server.run(sockets=[opened])
