"""Images over real HTTP: where the token is sent, the limits of size and time, the errors."""

from __future__ import annotations

import base64
import gzip
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from ml_backend.label_studio.client import LabelStudioClient
from ml_backend.label_studio.disk_cache import DiskCache
from ml_backend.label_studio.images import ImageSource, ImageUnavailable
from tests import image_host as host
from tests.image_host import CONTENT, Answer, Handler, ImageHost, image_host

TOKEN = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def make_server() -> Iterator[Callable[[], ImageHost]]:
    with ExitStack() as stack:
        yield lambda: stack.enter_context(image_host())


@pytest.fixture
def studio(make_server: Callable[[], ImageHost]) -> ImageHost:
    """Stands for Label Studio."""
    return make_server()


@pytest.fixture
def elsewhere(make_server: Callable[[], ImageHost]) -> ImageHost:
    """Another host: another port is one already."""
    return make_server()


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "images", 10**6)


def _source(
    base_url: str | None,
    cache: DiskCache,
    *,
    token: str | None = TOKEN,
    max_bytes: int = 100_000,
    timeout: float = 10.0,
    other_urls: Iterable[str] = (),
) -> ImageSource:
    client = LabelStudioClient(base_url, token) if base_url and token else None
    return ImageSource(
        base_url,
        client,
        cache,
        max_bytes=max_bytes,
        timeout=timeout,
        other_urls=other_urls,
        # The hosts of these tests are all this machine; tests/test_addresses.py is about that.
        allowed_hosts=["127.0.0.0/8"],
    )


# Where the token goes


def test_fetch_upload_is_requested_from_label_studio_with_the_token(
    studio: ImageHost, cache: DiskCache
) -> None:
    studio.answers["/data/upload/1/a.png"] = host.sent()
    assert _source(studio.url, cache).fetch(1, "/data/upload/1/a.png") == CONTENT
    assert studio.seen == [("/data/upload/1/a.png", f"Token {TOKEN}")]


def test_fetch_local_file_is_requested_from_label_studio_with_the_token(
    studio: ImageHost, cache: DiskCache
) -> None:
    studio.answers["/data/local-files/"] = host.sent()
    value = "/data/local-files/?d=photos/a%20b.png"
    assert _source(studio.url, cache).fetch(1, value) == CONTENT
    assert studio.seen == [(value, f"Token {TOKEN}")]


@pytest.mark.parametrize("scheme", ["s3", "gs", "azure-blob"])
def test_fetch_cloud_storage_is_resolved_by_label_studio_for_the_task(
    scheme: str, studio: ImageHost, elsewhere: ImageHost, cache: DiskCache
) -> None:
    # Ends in ÿ?>, whose base64 holds characters that mean something else in an address.
    value = f"{scheme}://bucket/photos/a b+ü~ÿ?>.png"
    studio.answers["/tasks/7/resolve/"] = host.redirect(f"{elsewhere.url}/signed?X-Signature=abc")
    elsewhere.answers["/signed"] = host.sent()
    assert _source(studio.url, cache).fetch(7, value) == CONTENT
    ((path, token),) = studio.seen
    assert token == f"Token {TOKEN}"
    (encoded,) = parse_qs(urlsplit(path).query)["fileuri"]
    assert base64.urlsafe_b64decode(encoded).decode() == value
    assert elsewhere.seen == [("/signed?X-Signature=abc", None)]


def test_fetch_cloud_storage_without_a_task_fails_without_a_request(
    studio: ImageHost, cache: DiskCache
) -> None:
    with pytest.raises(ImageUnavailable, match="task"):
        _source(studio.url, cache).fetch(None, "s3://bucket/a.png")
    assert studio.seen == []


def test_fetch_other_host_is_requested_without_the_token(
    studio: ImageHost, elsewhere: ImageHost, cache: DiskCache
) -> None:
    elsewhere.answers["/pictures/a.png"] = host.sent()
    value = f"{elsewhere.url}/pictures/a.png?size=large&token=t"
    assert _source(studio.url, cache).fetch(1, value) == CONTENT
    assert elsewhere.seen == [("/pictures/a.png?size=large&token=t", None)]
    assert studio.seen == []


def test_fetch_whole_address_of_label_studio_is_requested_with_the_token(
    studio: ImageHost, cache: DiskCache
) -> None:
    studio.answers["/data/upload/1/a.png"] = host.sent()
    assert _source(studio.url, cache).fetch(1, f"{studio.url}/data/upload/1/a.png") == CONTENT
    assert studio.tokens == [f"Token {TOKEN}"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_fetch_redirect_to_another_host_drops_the_token(
    status: int, studio: ImageHost, elsewhere: ImageHost, cache: DiskCache
) -> None:
    studio.answers["/data/upload/a.png"] = host.redirect(f"{elsewhere.url}/a.png", status)
    elsewhere.answers["/a.png"] = host.sent()
    assert _source(studio.url, cache).fetch(1, "/data/upload/a.png") == CONTENT
    assert studio.tokens == [f"Token {TOKEN}"]
    assert elsewhere.tokens == [None]


def test_fetch_other_name_of_the_same_machine_gets_no_token(
    studio: ImageHost, cache: DiskCache
) -> None:
    path = "/data/upload/a.png"
    studio.answers[path] = host.redirect(f"http://localhost:{studio.server_port}/data/b.png")
    studio.answers["/data/b.png"] = host.sent()
    assert _source(studio.url, cache).fetch(1, path) == CONTENT
    assert studio.tokens == [f"Token {TOKEN}", None]


def test_fetch_redirect_to_label_studio_itself_keeps_the_token(
    studio: ImageHost, cache: DiskCache
) -> None:
    studio.answers["/data/a.png"] = host.redirect("../files/b.png")
    studio.answers["/files/b.png"] = host.sent()
    assert _source(studio.url, cache).fetch(1, "/data/a.png") == CONTENT
    assert studio.seen == [
        ("/data/a.png", f"Token {TOKEN}"),
        ("/files/b.png", f"Token {TOKEN}"),
    ]


def test_fetch_redirect_back_to_label_studio_from_another_host_gets_no_token(
    studio: ImageHost, elsewhere: ImageHost, cache: DiskCache
) -> None:
    elsewhere.answers["/a.png"] = host.redirect(f"{studio.url}/data/b.png")
    studio.answers["/data/b.png"] = host.redirect(f"{elsewhere.url}/c.png")
    elsewhere.answers["/c.png"] = host.sent()
    assert _source(studio.url, cache).fetch(1, f"{elsewhere.url}/a.png") == CONTENT
    assert elsewhere.tokens == [None, None]


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:{other}\\@127.0.0.1:{own}/a.png",
        "http://127.0.0.1:{own}@127.0.0.1:{other}/a.png",
        "http://127.0.0.1:{other}#@127.0.0.1:{own}/a.png",
        "http://127.0.0.1:{other}?@127.0.0.1:{own}/a.png",
    ],
)
def test_fetch_ambiguous_address_sends_no_token_to_another_host(
    address: str, studio: ImageHost, elsewhere: ImageHost, cache: DiskCache
) -> None:
    value = address.format(own=studio.server_port, other=elsewhere.server_port)
    with pytest.raises(ImageUnavailable):
        _source(studio.url, cache).fetch(1, value)
    studio.answers["/way"] = host.redirect(value)
    with pytest.raises(ImageUnavailable):
        _source(studio.url, cache).fetch(1, "/way")
    assert elsewhere.tokens == [None, None]


def test_fetch_credentials_in_netrc_are_not_used(
    studio: ImageHost,
    elsewhere: ImageHost,
    cache: DiskCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password s3cret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(netrc))
    studio.answers["/data/a.png"] = host.redirect(f"{elsewhere.url}/a.png")
    elsewhere.answers["/a.png"] = host.sent()
    assert _source(studio.url, cache).fetch(1, "/data/a.png") == CONTENT
    assert _source(studio.url, cache, token=None).fetch(1, f"{elsewhere.url}/a.png?2") == CONTENT
    assert studio.tokens == [f"Token {TOKEN}"]
    assert elsewhere.tokens == [None, None]


# Addresses


@pytest.mark.parametrize(
    ("base", "value"),
    [
        ("/studio", "/data/upload/a.png"),
        ("/studio/", "/data/upload/a.png"),
        ("/studio", "/studio/data/upload/a.png"),
        ("/studio/", "/studio/data/upload/a.png"),
    ],
)
def test_fetch_upload_under_a_sub_path_is_found_with_and_without_it(
    base: str, value: str, studio: ImageHost, cache: DiskCache
) -> None:
    studio.answers["/studio/data/upload/a.png"] = host.sent()
    assert _source(studio.url + base, cache).fetch(1, value) == CONTENT
    assert studio.seen == [("/studio/data/upload/a.png", f"Token {TOKEN}")]


def test_fetch_folder_that_begins_like_the_sub_path_is_not_shortened(
    studio: ImageHost, cache: DiskCache
) -> None:
    studio.answers["/data/database/a.png"] = host.sent()
    assert _source(f"{studio.url}/data", cache).fetch(1, "/database/a.png") == CONTENT


def test_fetch_cloud_storage_under_a_sub_path_is_resolved_below_it(
    studio: ImageHost, cache: DiskCache
) -> None:
    studio.answers["/studio/tasks/7/resolve/"] = host.sent()
    assert _source(f"{studio.url}/studio", cache).fetch(7, "s3://bucket/a.png") == CONTENT
    assert studio.tokens == [f"Token {TOKEN}"]


@pytest.mark.parametrize("value", ["/data/upload/a.png", "s3://bucket/a.png"])
def test_fetch_without_label_studios_address_error_names_the_settings(
    value: str, cache: DiskCache
) -> None:
    with pytest.raises(ImageUnavailable) as caught:
        _source(None, cache).fetch(1, value)
    assert "LABEL_STUDIO_URL" in str(caught.value)
    assert "LABEL_STUDIO_API_KEY" in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "a.png",
        "ftp://127.0.0.1/a.png",
        "file:///etc/hostname",
        "http://",
        "http://[",
        "http://[::1/a.png",
        "http://127.0.0.1:99999/a.png",
        "http://127.0.0.1:x/a.png",
        "/data/\ud800.png",
        "http://127.0.0.1/\ud800.png",
    ],
)
def test_fetch_invalid_address_raises_image_unavailable(
    value: str, studio: ImageHost, cache: DiskCache
) -> None:
    with pytest.raises(ImageUnavailable):
        _source(studio.url, cache).fetch(1, value)
    assert studio.seen == []


# Addresses that are good for browsers alone (LABEL_STUDIO_HOST)

BROWSERS = "http://label-studio.example:8080"


@pytest.mark.parametrize(
    ("base", "browsers", "value", "path"),
    [
        (
            "",
            BROWSERS,
            f"{BROWSERS}/data/local-files/?d=a%20b.png",
            "/data/local-files/?d=a%20b.png",
        ),
        ("", f"{BROWSERS}/", f"{BROWSERS}/data/upload/1/a.png", "/data/upload/1/a.png"),
        ("", f"{BROWSERS}/ls", f"{BROWSERS}/ls/data/upload/1/a.png", "/data/upload/1/a.png"),
        ("", f"{BROWSERS}/ls", f"{BROWSERS}/data/upload/1/a.png", "/data/upload/1/a.png"),
        ("/ls", f"{BROWSERS}/ls", f"{BROWSERS}/ls/data/upload/a.png", "/ls/data/upload/a.png"),
        ("/in", f"{BROWSERS}/ls", f"{BROWSERS}/ls/data/upload/a.png", "/in/data/upload/a.png"),
        ("/in", BROWSERS, f"{BROWSERS}/data/local-files/?d=a.png", "/in/data/local-files/?d=a.png"),
        ("", "http://label-studio.example", "http://label-studio.example:80/data/upload/a", None),
        ("", BROWSERS, f"{BROWSERS}/data/upload/../upload/a.png", "/data/upload/a.png"),
    ],
)
def test_fetch_file_under_another_address_of_label_studio_uses_the_known_one(
    base: str, browsers: str, value: str, path: str | None, studio: ImageHost, cache: DiskCache
) -> None:
    path = path or urlsplit(value).path
    studio.answers[urlsplit(path).path] = host.sent()
    source = _source(studio.url + base, cache, other_urls=[browsers])
    assert source.fetch(1, value) == CONTENT
    assert studio.seen == [(path, f"Token {TOKEN}")]
    assert "Label Studio" in source.route_of(value)


@pytest.mark.parametrize(
    "path",
    [
        "/pictures/a.png",
        "/other/data/upload/a.png",
        "/data/upload/../../pictures/a.png",
        "/pictures/a.png?x=/data/upload/a.png",
    ],
)
def test_fetch_other_files_of_that_host_are_requested_there_without_the_token(
    path: str, studio: ImageHost, elsewhere: ImageHost, cache: DiskCache
) -> None:
    elsewhere.answers["/pictures/a.png"] = elsewhere.answers["/other/data/upload/a.png"] = (
        host.sent()
    )
    source = _source(studio.url, cache, other_urls=[elsewhere.url])
    assert source.fetch(1, elsewhere.url + path) == CONTENT
    assert elsewhere.tokens == [None]
    assert studio.seen == []
    assert source.route_of(elsewhere.url + path) == "from its own address"


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:{other}/data/upload/a.png",
        "http://127.0.0.1:{other}\\@label-studio.example:8080/data/upload/a.png",
        "http://label-studio.example:8080@127.0.0.1:{other}/data/upload/a.png",
    ],
)
def test_fetch_same_path_at_another_host_gets_no_token(
    address: str, studio: ImageHost, elsewhere: ImageHost, cache: DiskCache
) -> None:
    elsewhere.answers["/data/upload/a.png"] = host.sent()
    value = address.format(other=elsewhere.server_port)
    source = _source(studio.url, cache, other_urls=[BROWSERS])
    with suppress(ImageUnavailable):
        source.fetch(1, value)
    assert elsewhere.tokens == [None]
    assert studio.seen == []


# Inline images


def _data(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def test_fetch_inline_image_gives_its_content(cache: DiskCache) -> None:
    assert _source(None, cache).fetch(None, _data(CONTENT)) == CONTENT
    assert _source(None, cache).fetch(None, "data:image/svg+xml,%3Csvg%2F%3E") == b"<svg/>"


@pytest.mark.parametrize(
    "value",
    [
        "data:text/html;base64,PGh0bWw+",
        "data:image/png;base64",
        "data:image/png;base64,a",
        "data:image/png;base64,????",
        "data:image/png;base64,üüüü",
        "data:,",
    ],
)
def test_fetch_damaged_inline_image_raises_image_unavailable(value: str, cache: DiskCache) -> None:
    with pytest.raises(ImageUnavailable, match="data:"):
        _source(None, cache).fetch(1, value)


def test_fetch_inline_image_above_the_size_limit_fails(cache: DiskCache) -> None:
    source = _source(None, cache, max_bytes=1000)
    assert source.fetch(1, _data(b"x" * 1000)) == b"x" * 1000
    with pytest.raises(ImageUnavailable, match="1,000"):
        source.fetch(1, _data(b"x" * 1001))


# Limits


@pytest.mark.parametrize("answer", [host.sent, host.until_closed], ids=["with a length", "without"])
def test_fetch_image_at_the_size_limit_is_read_and_above_it_fails(
    answer: Callable[[bytes], Answer], studio: ImageHost, cache: DiskCache
) -> None:
    source = _source(studio.url, cache, max_bytes=200_000)
    studio.answers["/fits.png"] = answer(b"x" * 200_000)
    studio.answers["/large.png"] = answer(b"x" * 200_001)
    assert source.fetch(1, "/fits.png") == b"x" * 200_000
    with pytest.raises(ImageUnavailable) as caught:
        source.fetch(1, "/large.png")
    assert "/large.png" in str(caught.value)
    assert "ML_BACKEND_IMAGE_MAX_BYTES" in str(caught.value)


def test_fetch_endless_answer_fails_at_the_size_limit(studio: ImageHost, cache: DiskCache) -> None:
    studio.answers["/a.png"] = host.endless
    with pytest.raises(ImageUnavailable, match="ML_BACKEND_IMAGE_MAX_BYTES"):
        _source(studio.url, cache, max_bytes=1_000_000, timeout=30).fetch(1, "/a.png")


def test_fetch_compressed_answer_is_limited_by_its_unpacked_size(
    studio: ImageHost, cache: DiskCache
) -> None:
    studio.answers["/fits.png"] = host.sent(gzip.compress(CONTENT), Content_Encoding="gzip")
    studio.answers["/bomb.png"] = host.sent(gzip.compress(bytes(10**7)), Content_Encoding="gzip")
    source = _source(studio.url, cache)
    assert source.fetch(1, "/fits.png") == CONTENT
    with pytest.raises(ImageUnavailable, match="ML_BACKEND_IMAGE_MAX_BYTES"):
        source.fetch(1, "/bomb.png")


def test_fetch_error_shows_the_address_in_one_line_without_a_signature(
    studio: ImageHost, cache: DiskCache
) -> None:
    source = _source(studio.url, cache)
    for value in (
        f"{studio.url}/a.png\n2026-01-01 ERROR forged",
        "not an address\r\nforged",
        f"{studio.url}/a.png?X-Amz-Signature=5ecret",
    ):
        with pytest.raises(ImageUnavailable) as caught:
            source.fetch(1, value)
        assert str(caught.value).isprintable()
        assert "5ecret" not in str(caught.value)


@pytest.mark.parametrize("where", ["/head", "/more heads", "/chunk", "/trailer"])
@pytest.mark.parametrize("proxied", [False, True])
def test_fetch_slow_bytes_at_any_place_fail_at_the_timeout(
    where: str,
    proxied: bool,
    studio: ImageHost,
    cache: DiskCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    starts = {
        "/head": b"HTTP/1.1 200 OK\r\nX: ",
        "/more heads": b"HTTP/1.1 200 OK\r\n",
        "/chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n1;",
        "/trailer": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n",
    }
    piece = b"X: a\r\n" if where in ("/more heads", "/trailer") else b"a"

    def answer(handler: Handler) -> None:
        handler.wfile.write(starts[where])
        while not handler.server.closing.wait(0.1):
            handler.wfile.write(piece)

    studio.answers["/slow.png"] = answer
    address = "/slow.png"
    if proxied:
        monkeypatch.setenv("http_proxy", studio.url)
        address = "http://images.invalid/slow.png"
    begun = time.monotonic()
    with pytest.raises(ImageUnavailable, match=r"longer than 0\.8 s|/slow\.png"):
        _source(studio.url, cache, timeout=0.8).fetch(1, address)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("answer", [host.drip, host.stall, host.silence])
def test_fetch_slow_image_fails_at_the_timeout(
    answer: Answer, studio: ImageHost, cache: DiskCache
) -> None:
    studio.answers["/slow.png"] = answer
    begun = time.monotonic()
    with pytest.raises(ImageUnavailable, match=r"/slow\.png"):
        _source(studio.url, cache, timeout=0.8).fetch(1, "/slow.png")
    # The drip alone would take 50 s.
    assert time.monotonic() - begun < 10


def test_fetch_timeout_includes_all_redirects(studio: ImageHost, cache: DiskCache) -> None:
    def slowly(handler: Handler) -> None:
        handler.server.closing.wait(0.6)
        host.redirect("/next.png")(handler)

    studio.answers["/next.png"] = slowly
    begun = time.monotonic()
    with pytest.raises(ImageUnavailable):
        _source(studio.url, cache, timeout=0.8).fetch(1, "/next.png")
    assert len(studio.seen) <= 3
    assert time.monotonic() - begun < 10


def _broken_off(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"x" * 500)
    handler.close_connection = True


def _broken_chunks(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"5\r\nxxxxx\r\n")
    handler.close_connection = True


def _hung_up(handler: Handler) -> None:
    handler.close_connection = True


@pytest.mark.parametrize(
    "answer",
    [_broken_off, _broken_chunks, _hung_up, host.sent(b"no gzip", Content_Encoding="gzip")],
    ids=["broken off", "broken chunks", "hung up", "wrongly packed"],
)
def test_fetch_incomplete_answer_fails_and_is_not_cached(
    answer: Answer, studio: ImageHost, cache: DiskCache
) -> None:
    source = _source(studio.url, cache)
    studio.answers["/a.png"] = answer
    with pytest.raises(ImageUnavailable, match=r"/a\.png"):
        source.fetch(1, "/a.png")
    studio.answers["/a.png"] = host.sent()
    assert source.fetch(1, "/a.png") == CONTENT


def test_fetch_redirect_loop_fails(
    studio: ImageHost, elsewhere: ImageHost, cache: DiskCache
) -> None:
    studio.answers["/a.png"] = host.redirect(f"{elsewhere.url}/b.png")
    elsewhere.answers["/b.png"] = host.redirect(f"{studio.url}/a.png")
    with pytest.raises(ImageUnavailable, match="redirected more than"):
        _source(studio.url, cache).fetch(1, "/a.png")
    assert len(studio.seen) + len(elsewhere.seen) < 10
    assert set(elsewhere.tokens) == {None}


@pytest.mark.parametrize("location", ["file:///etc/hostname", "ftp://127.0.0.1/a", "http://["])
def test_fetch_redirect_to_another_scheme_is_not_followed(
    location: str, studio: ImageHost, cache: DiskCache
) -> None:
    studio.answers["/a.png"] = host.redirect(location)
    with pytest.raises(ImageUnavailable):
        _source(studio.url, cache).fetch(1, "/a.png")
    assert len(studio.seen) == 1


# What an admin reads


@pytest.mark.parametrize(
    ("path", "status", "advice"),
    [
        ("/data/upload/a.png", 404, ["is the file still there"]),
        ("/data/upload/a.png", 403, ["LABEL_STUDIO_API_KEY", "may not see it"]),
        ("/data/upload/a.png", 401, ["LABEL_STUDIO_API_KEY", "may not see it"]),
        (
            "/data/local-files/?d=a.png",
            404,
            ["local storage", "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true"],
        ),
        ("/data/local-files/?d=a.png", 403, ["local storage"]),
    ],
)
def test_fetch_error_status_of_label_studio_names_the_remedy(
    path: str, status: int, advice: list[str], studio: ImageHost, cache: DiskCache
) -> None:
    studio.answers[urlsplit(path).path] = host.empty(status)
    with pytest.raises(ImageUnavailable) as caught:
        _source(studio.url, cache).fetch(1, path)
    for part in [path, str(status), *advice]:
        assert part in str(caught.value)


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_fetch_error_status_of_another_host_asks_for_access_without_a_login(
    status: int, studio: ImageHost, elsewhere: ImageHost, cache: DiskCache
) -> None:
    elsewhere.answers["/a.png"] = host.empty(status)
    with pytest.raises(ImageUnavailable) as caught:
        _source(studio.url, cache).fetch(1, f"{elsewhere.url}/a.png")
    assert str(status) in str(caught.value)
    assert "without a login" in str(caught.value)
    assert elsewhere.tokens == [None]


def test_fetch_error_status_without_a_token_names_the_settings(
    studio: ImageHost, cache: DiskCache
) -> None:
    studio.answers["/data/upload/a.png"] = host.empty(401)
    with pytest.raises(ImageUnavailable, match="LABEL_STUDIO_API_KEY"):
        _source(studio.url, cache, token=None).fetch(1, "/data/upload/a.png")
    assert studio.tokens == [None]


def test_fetch_expired_token_is_refreshed_and_tried_once_more(
    studio: ImageHost, cache: DiskCache
) -> None:
    def answer(handler: Handler) -> None:
        (host.empty(401) if len(studio.seen) == 1 else host.sent())(handler)

    studio.answers["/data/a.png"] = answer
    assert _source(studio.url, cache).fetch(1, "/data/a.png") == CONTENT
    assert studio.tokens == [f"Token {TOKEN}"] * 2


@pytest.mark.parametrize(
    "path",
    ["/user/logout/", "/api/current-user/token", "/data/upload/../../api/projects/1/", "/data"],
)
def test_fetch_other_paths_of_label_studio_get_no_token(
    path: str, studio: ImageHost, elsewhere: ImageHost, cache: DiskCache
) -> None:
    elsewhere.answers["/back"] = host.redirect(f"{studio.url}{path}")
    source = _source(studio.url, cache)
    for value in (path, f"{studio.url}{path}", f"{elsewhere.url}/back"):
        with pytest.raises(ImageUnavailable, match="without a login"):
            source.fetch(1, value)
    assert studio.tokens == [None] * 3


def test_fetch_unreachable_host_error_names_it(
    make_server: Callable[[], ImageHost], cache: DiskCache
) -> None:
    gone = make_server()
    gone.shutdown()
    gone.server_close()
    with pytest.raises(ImageUnavailable, match="reachable") as caught:
        _source(None, cache).fetch(1, f"{gone.url}/a.png")
    assert gone.url in str(caught.value)


def test_fetch_errors_never_contain_the_token(studio: ImageHost, cache: DiskCache) -> None:
    studio.answers["/data/drop.png"] = _hung_up
    for path in ("/data/missing.png", "/data/drop.png"):
        with pytest.raises(ImageUnavailable) as caught:
            _source(studio.url, cache).fetch(1, path)
        assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("token", ["geheim…", "geheim\r\nX-Other: a", "geheim\x00"])
def test_fetch_malformed_token_is_reported_and_neither_sent_nor_shown(
    token: str, studio: ImageHost, cache: DiskCache
) -> None:
    with pytest.raises(ImageUnavailable, match="LABEL_STUDIO_API_KEY") as caught:
        _source(studio.url, cache, token=token).fetch(1, "/data/a.png")
    assert "geheim" not in str(caught.value)
    assert studio.seen == []


# The cache


def test_fetch_second_time_reads_the_cache_also_after_a_restart(
    studio: ImageHost, tmp_path: Path
) -> None:
    studio.answers["/a.png"] = host.sent()
    for _ in range(2):
        source = _source(studio.url, DiskCache(tmp_path / "images", 10**6))
        assert source.fetch(1, "/a.png") == CONTENT
        assert source.fetch(2, "/a.png") == CONTENT
    assert len(studio.seen) == 1


def test_fetch_same_upload_of_two_label_studios_is_cached_separately(
    studio: ImageHost, elsewhere: ImageHost, cache: DiskCache
) -> None:
    studio.answers["/data/upload/1/a.png"] = host.sent(b"one")
    elsewhere.answers["/data/upload/1/a.png"] = host.sent(b"two")
    assert _source(studio.url, cache).fetch(1, "/data/upload/1/a.png") == b"one"
    assert _source(elsewhere.url, cache).fetch(1, "/data/upload/1/a.png") == b"two"


def test_fetch_error_is_not_cached(studio: ImageHost, cache: DiskCache) -> None:
    source = _source(studio.url, cache)
    with pytest.raises(ImageUnavailable):
        source.fetch(1, "/a.png")
    studio.answers["/a.png"] = host.sent()
    assert source.fetch(1, "/a.png") == CONTENT


def test_fetch_cache_limit_of_zero_stores_nothing(studio: ImageHost, tmp_path: Path) -> None:
    studio.answers["/a.png"] = host.sent()
    source = _source(studio.url, DiskCache(tmp_path / "images", 0))
    assert source.fetch(1, "/a.png") == CONTENT
    assert source.fetch(1, "/a.png") == CONTENT
    assert len(studio.seen) == 2
    assert not (tmp_path / "images").exists()


def test_fetch_cache_folder_not_writable_still_reads_images(
    studio: ImageHost, tmp_path: Path
) -> None:
    in_the_way = tmp_path / "images"
    in_the_way.write_text("a file where the folder should be")
    studio.answers["/a.png"] = host.sent()
    source = _source(studio.url, DiskCache(in_the_way, 10**6))
    assert source.fetch(1, "/a.png") == CONTENT
    assert source.fetch(1, "/a.png") == CONTENT
    assert len(studio.seen) == 2
