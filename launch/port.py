"""A free port that stays ours until torch listens on it."""

from __future__ import annotations

import socket


def reserve_port(address: str) -> socket.socket:
    """A socket bound to a free port of ``address`` ("" is every address); the port is ours while it stays open.

    It does not listen and carries SO_REUSEADDR, so Linux lets torch's TCPStore (which sets it too) listen on the same
    port, while other programs that ask for any free port are never given it.
    """
    reserved = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind((address, 0))
    return reserved
