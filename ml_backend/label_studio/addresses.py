"""Guards against images from addresses inside this machine's network (SSRF).

People write image addresses into tasks, and this machine reaches hosts that they do not: its own
services, its network, its cloud's metadata. So a name is resolved once, the numeric addresses are
checked, and the connection goes to a checked address: a name that resolves differently a moment
later (DNS rebinding) has no effect. Each redirect is a new connection and is checked too. Only
numeric addresses are compared, never spellings: `http://2130706433/` is also `127.0.0.1`.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import requests
from requests.utils import select_proxy
from urllib3.connection import HTTPConnection
from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url
from urllib3.util.connection import allowed_gai_family, create_connection

from ml_backend.label_studio.connections import DeadlineAdapter

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Origin = tuple[str | None, str | None, int | None]

_TRIED = 3
"""Addresses of one name that are tried; each may take the whole timeout."""
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_NOT_PUBLIC = (
    # Local networks that not every release of the standard library counts as such.
    ipaddress.ip_network("192.0.0.0/24"),
    ipaddress.ip_network("64:ff9b:1::/48"),
    # Azure's host service, which gives settings and secrets to virtual machines.
    ipaddress.ip_network("168.63.129.16/32"),
)


class AddressRefused(RuntimeError):
    """An address is in this machine's network; the text names the setting that allows it."""


class Guard:
    """Decides which addresses may be connected to.

    These are all public ones, those that an admin allows, and Label Studio's own scheme, host and
    port, wherever its name leads.

    Args:
        own: Label Studio's addresses.
        allowed: names of hosts, addresses, and networks (`10.0.0.0/8`).
    """

    def __init__(self, own: Iterable[str], allowed: Iterable[str]) -> None:
        self._own: set[Origin] = set()
        for url in own:
            # The address in a `/setup` request may be invalid.
            with suppress(LocationParseError):
                self._own.add(origin_of(url))
        self._names: set[str] = set()
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        for entry in allowed:
            try:
                self._networks.append(ipaddress.ip_network(entry, strict=False))
            except ValueError:
                self._names.add(entry.lower())

    def resolve(self, scheme: str, host: str, port: int) -> list[str]:
        """Resolves a host's name to the numeric addresses that may be connected to.

        Raises:
            AddressRefused: none of its addresses may be connected to.
            OSError: the name cannot be resolved.
        """
        host = host.strip("[]").lower()
        rows = socket.getaddrinfo(host, port, allowed_gai_family(), socket.SOCK_STREAM)
        found = list(dict.fromkeys(str(row[4][0]) for row in rows))
        if (scheme, host, port) in self._own or host in self._names:
            return found
        open_ones = [address for address in found if self.allows(address)]
        if not open_ones:
            raise AddressRefused(
                f"{host} leads to {found[0]}, which is in this machine's own network: if images "
                f"may come from there, add {host} to ML_BACKEND_ALLOWED_IMAGE_HOSTS"
            )
        return open_ones

    def allows(self, address: str) -> bool:
        """Says whether a numeric address may be connected to under every name."""
        plain = _plain(ipaddress.ip_address(address))
        return _is_public(plain) or any(plain in network for network in self._networks)

    def adapter(self) -> DeadlineAdapter:
        """Makes an adapter that checks each of its connections; for use in one thread."""
        return _Adapter(self)


def origin_of(url: str) -> Origin:
    """Parses scheme, host and port of an address.

    Raises:
        LocationParseError: it has none.
    """
    # requests connects by this parser. urlsplit reads a different host from
    # http://other.example\\@label-studio.example/.
    parts = parse_url(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme or "")
    return parts.scheme, parts.host.strip("[]") if parts.host else None, port


def _plain(address: Address) -> Address:
    """Converts an IPv6 address that embeds an IPv4 address to the latter."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _is_public(address: Address) -> bool:
    # The reserved addresses include older forms of IPv6 that embed an IPv4 address.
    return (
        address.is_global
        and not (address.is_multicast or address.is_reserved)
        and not (isinstance(address, ipaddress.IPv6Address) and address.is_site_local)
        and not any(address in network for network in _NOT_PUBLIC)
    )


class _Adapter(DeadlineAdapter):
    """Connects to addresses that a guard allows."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        super().__init__()

    def connect(self, scheme: str, connection: HTTPConnection) -> socket.socket:
        return _connect(self._guard, scheme, connection)

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> Any:
        proxy = select_proxy(request.url or "", kwargs.get("proxies"))
        if proxy is not None:
            # The proxy makes the connection, and may know names that are unknown here.
            scheme, host, port = origin_of(request.url or "")
            with suppress(OSError):
                self._guard.resolve(scheme or "", host or "", port or 0)
        return super().send(request, *args, **kwargs)


def _connect(guard: Guard, scheme: str, connection: HTTPConnection) -> socket.socket:
    failure = OSError(f"{connection.host} leads nowhere")
    for address in guard.resolve(scheme, connection.host, connection.port)[:_TRIED]:
        try:
            return create_connection(
                (address, connection.port),
                connection.timeout,
                source_address=connection.source_address,
                socket_options=connection.socket_options,
            )
        except OSError as error:
            failure = error
    raise failure
