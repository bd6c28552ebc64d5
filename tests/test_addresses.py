"""Addresses come from people: none leads into this machine's own network, however it is written."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ml_backend.label_studio.addresses import Guard
from ml_backend.label_studio.client import LabelStudioClient
from ml_backend.label_studio.disk_cache import DiskCache
from ml_backend.label_studio.images import ImageSource, ImageUnavailable
from tests import image_host as host
from tests.image_host import CONTENT, ImageHost, image_host

TOKEN = "0123456789abcdef0123456789abcdef01234567"
SETTING = "ML_BACKEND_ALLOWED_IMAGE_HOSTS"


@pytest.fixture
def make_host() -> Iterator[Callable[..., ImageHost]]:
    with ExitStack() as stack:

        def make(address: tuple[str, int] = ("127.0.0.1", 0)) -> ImageHost:
            made = stack.enter_context(image_host(address))
            made.answers["/a.png"] = host.sent()
            return made

        yield make


@pytest.fixture
def studio(make_host: Callable[..., ImageHost]) -> ImageHost:
    """Stands for Label Studio."""
    return make_host()


@pytest.fixture
def inside(make_host: Callable[..., ImageHost]) -> ImageHost:
    """Something else in this machine's own network."""
    return make_host()


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., ImageSource]:
    def make(
        base_url: str | None = None, *, allowed: Sequence[str] = (), others: Sequence[str] = ()
    ) -> ImageSource:
        return ImageSource(
            base_url,
            LabelStudioClient(base_url, TOKEN) if base_url else None,
            DiskCache(tmp_path, 0),
            max_bytes=10_000,
            timeout=5,
            other_urls=others,
            allowed_hosts=allowed,
        )

    return make


Source = Callable[..., ImageSource]


def _leads_to(monkeypatch: pytest.MonkeyPatch, name: str, *answers: Sequence[str]) -> None:
    """Makes a name resolve to these addresses, other ones each time it is asked for."""
    asked = iter(answers)
    real = socket.getaddrinfo

    def resolve(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host != name:
            return real(host, port, *args, **kwargs)
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in next(asked)
        ]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "localhost"),
        ("LocalHost", "localhost"),
        ("localhost.", "127.0.0.0/8"),
        ("127.1", "127.0.0.0/8"),
        ("2130706433", "127.0.0.0/8"),
        ("0x7f000001", "127.0.0.0/8"),
        ("017700000001", "127.0.0.0/8"),
        ("%31%32%37.0.0.1", "127.0.0.0/8"),
        ("0.0.0.0", "0.0.0.0"),
        ("someone@127.0.0.1", "127.0.0.1"),
    ],
)
def test_guard_any_spelling_of_this_machine_is_refused_unless_allowed(
    name: str, allowed: str, inside: ImageHost, source: Source
) -> None:
    address = f"http://{name}:{inside.server_port}/a.png"
    with pytest.raises(ImageUnavailable, match=SETTING) as caught:
        source().fetch(1, address)
    assert address in str(caught.value)
    assert inside.connections == 0
    assert source(allowed=[allowed]).fetch(1, address) == CONTENT


@pytest.mark.parametrize(
    "address",
    [
        # Loopback, unspecified, private, shared, link-local and cloud metadata.
        *("127.0.0.1", "127.255.0.1", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1"),
        *("172.31.255.255", "192.168.1.1", "100.64.0.1", "100.100.100.200", "169.254.1.1"),
        *("169.254.169.254", "192.0.0.192", "168.63.129.16", "198.18.0.1"),
        # Multicast, reserved, broadcast.
        *("224.0.0.1", "224.0.1.1", "239.255.255.250", "240.0.0.1", "255.255.255.255"),
        *("::1", "::", "fe80::1", "fe80::1%1", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1"),
        *("ff0e::1", "2001:db8::1"),
        # IPv4 within IPv6: mapped, compatible, 6to4, Teredo, NAT64.
        *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:10.0.0.1", "::127.0.0.1"),
        *("2002:7f00:1::", "2002:a9fe:a9fe::1", "2001:0:1::1", "64:ff9b::169.254.169.254"),
        *("64:ff9b::a00:1", "64:ff9b:1::1"),
    ],
)
def test_guard_address_that_is_not_public_is_refused(address: str) -> None:
    assert not Guard([], []).allows(address)


@pytest.mark.parametrize(
    "address",
    [
        "8.8.8.8",
        "172.32.0.1",
        "192.167.0.1",
        "2606:4700::1111",
        "::ffff:8.8.8.8",
        "64:ff9b::8.8.8.8",
    ],
)
def test_guard_public_address_is_allowed(address: str) -> None:
    assert Guard([], []).allows(address)


@pytest.mark.parametrize(
    ("allowed", "address", "expected"),
    [
        ("192.168.7.0/24", "192.168.7.9", True),
        ("192.168.7.0/24", "192.168.8.9", False),
        ("192.168.7.0/24", "::ffff:192.168.7.9", True),
        ("fd12::/16", "fd12::5", True),
        ("fd12::/16", "fd13::5", False),
        ("10.0.0.7", "10.0.0.7", True),
        ("10.0.0.7", "10.0.0.8", False),
        ("minio", "10.0.0.7", False),
    ],
)
def test_guard_allowed_network_allows_no_other_address(
    allowed: str, address: str, expected: bool
) -> None:
    assert Guard([], [allowed]).allows(address) is expected


def test_guard_label_studios_own_origin_is_allowed_and_no_other_port(
    studio: ImageHost, inside: ImageHost, source: Source
) -> None:
    studio.answers["/data/upload/a.png"] = host.redirect(f"{studio.url}/a.png")
    assert source(studio.url).fetch(1, "/data/upload/a.png") == CONTENT
    assert source(studio.url).fetch(1, f"{studio.url}/a.png") == CONTENT
    # What `/setup` was told of its address allows nothing: anyone may have sent that.
    with pytest.raises(ImageUnavailable, match=SETTING):
        source("http://10.0.0.9", others=[studio.url]).fetch(1, f"{studio.url}/a.png")
    for url in (inside.url, f"https://127.0.0.1:{studio.server_port}"):
        with pytest.raises(ImageUnavailable, match=SETTING):
            source(studio.url).fetch(1, f"{url}/a.png")
    assert inside.connections == 0


def test_guard_redirect_to_a_refused_address_is_not_followed(
    studio: ImageHost, inside: ImageHost, source: Source
) -> None:
    studio.answers["/data/upload/a.png"] = host.redirect(f"{studio.url}/next")
    studio.answers["/next"] = host.redirect(f"{inside.url}/a.png")
    with pytest.raises(ImageUnavailable, match=SETTING):
        source(studio.url).fetch(1, "/data/upload/a.png")
    assert len(studio.seen) == 2
    assert inside.connections == 0


def test_guard_name_that_resolves_differently_later_connects_to_the_checked_address(
    inside: ImageHost,
    make_host: Callable[..., ImageHost],
    source: Source,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 127.0.0.2 stands for a public address: this one alone is allowed here.
    outside = make_host(("127.0.0.2", inside.server_port))
    _leads_to(monkeypatch, "rebind.example", ["127.0.0.2"], ["127.0.0.1"], ["127.0.0.1"])
    address = f"http://rebind.example:{inside.server_port}/a.png"
    assert source(allowed=["127.0.0.2"]).fetch(1, address) == CONTENT
    # Over a new connection the name is resolved, and checked, anew.
    with pytest.raises(ImageUnavailable, match=SETTING):
        source(allowed=["127.0.0.2"]).fetch(1, address)
    assert (outside.connections, inside.connections) == (1, 0)


def test_guard_name_with_several_addresses_tries_only_the_allowed_ones(
    inside: ImageHost,
    make_host: Callable[..., ImageHost],
    source: Source,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_host(("127.0.0.2", inside.server_port))
    # Nothing answers at 127.0.0.3.
    _leads_to(monkeypatch, "both.example", ["127.0.0.1", "127.0.0.3", "127.0.0.2"])
    address = f"http://both.example:{inside.server_port}/a.png"
    assert source(allowed=["127.0.0.2/31"]).fetch(1, address) == CONTENT
    assert inside.connections == 0


def test_guard_tls_connects_to_the_checked_address_and_sends_the_name(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        port = listener.getsockname()[1]
        hello: list[bytes] = []

        def take() -> None:
            connection = listener.accept()[0]
            hello.append(connection.recv(4096))
            connection.close()

        taking = threading.Thread(target=take)
        taking.start()
        _leads_to(monkeypatch, "images.example", ["127.0.0.1"], ["127.0.0.1"])
        address = f"https://images.example:{port}/a.png"
        with pytest.raises(ImageUnavailable, match=SETTING):
            source().fetch(1, address)
        assert not hello
        with pytest.raises(ImageUnavailable):
            source(allowed=["127.0.0.1"]).fetch(1, address)
        taking.join()
    # The handshake names the host, not the number that it was resolved to.
    assert b"images.example" in hello[0]


def test_guard_behind_a_proxy_refuses_names_that_resolve_inside_the_network(
    studio: ImageHost, inside: ImageHost, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", inside.url)
    with pytest.raises(ImageUnavailable, match=SETTING):
        source().fetch(1, f"{studio.url}/a.png")
    assert inside.connections == 0
    # Names that are not known here are the proxy's business; the proxy itself may be anywhere.
    assert source().fetch(1, "http://images.invalid/a.png") == CONTENT
    assert inside.seen == [("http://images.invalid/a.png", None)]


@pytest.mark.parametrize("own", ["http://[", "http://", "label-studio:8080", "http://x:y"])
def test_guard_invalid_address_of_label_studio_allows_nothing(
    own: str, inside: ImageHost, source: Source
) -> None:
    with pytest.raises(ImageUnavailable, match=SETTING):
        source(own, others=[own]).fetch(1, f"{inside.url}/a.png")
    assert inside.connections == 0
