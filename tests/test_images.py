"""Images over real HTTP: the token stays with Label Studio, and no image takes too much."""

from __future__ import annotations

import base64
import gzip
import threading
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


def test_an_upload_is_read_from_label_studio_with_the_token(
    studio: ImageHost, cache: DiskCache
) -> None:
    studio.answers["/data/upload/1/a.png"] = host.sent()
    assert _source(studio.url, cache).fetch(1, "/data/upload/1/a.png") == CONTENT
    assert studio.seen == [("/data/upload/1/a.png", f"Token {TOKEN}")]


def test_local_files_are_read_from_label_studio_with_the_token(
    studio: ImageHost, cache: DiskCache
) -> None:
    studio.answers["/data/local-files/"] = host.sent()
    value = "/data/local-files/?d=photos/a%20b.png"
    assert _source(studio.url, cache).fetch(1, value) == CONTENT
    assert studio.seen == [(value, f"Token {TOKEN}")]


@pytest.mark.parametrize("scheme", ["s3", "gs", "azure-blob"])
def test_cloud_storage_is_read_by_way_of_the_task(
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


def test_cloud_storage_without_a_task_is_refused_without_a_request(
    studio: ImageHost, cache: DiskCache
) -> None:
    with pytest.raises(ImageUnavailable, match="task"):
        _source(studio.url, cache).fetch(None, "s3://bucket/a.png")
    assert studio.seen == []


def test_another_hosts_image_is_read_as_it_is_without_the_token(
    studio: ImageHost, elsewhere: ImageHost, cache: DiskCache
) -> None:
    elsewhere.answers["/pictures/a.png"] = host.sent()
    value = f"{elsewhere.url}/pictures/a.png?size=large&token=t"
    assert _source(studio.url, cache).fetch(1, value) == CONTENT
    assert elsewhere.seen == [("/pictures/a.png?size=large&token=t", None)]
    assert studio.seen == []


def test_label_studios_own_whole_address_gets_the_token(
    studio: ImageHost, cache: DiskCache
) -> None:
    studio.answers["/data/upload/1/a.png"] = host.sent()
    assert _source(studio.url, cache).fetch(1, f"{studio.url}/data/upload/1/a.png") == CONTENT
    assert studio.tokens == [f"Token {TOKEN}"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_token_stays_behind_where_label_studio_redirects_elsewhere(
    status: int, studio: ImageHost, elsewhere: ImageHost, cache: DiskCache
) -> None:
    studio.answers["/data/upload/a.png"] = host.redirect(f"{elsewhere.url}/a.png", status)
    elsewhere.answers["/a.png"] = host.sent()
    assert _source(studio.url, cache).fetch(1, "/data/upload/a.png") == CONTENT
    assert studio.tokens == [f"Token {TOKEN}"]
    assert elsewhere.tokens == [None]


def test_the_same_machine_under_another_name_is_another_host(
    studio: ImageHost, cache: DiskCache
) -> None:
    path = "/data/upload/a.png"
    studio.answers[path] = host.redirect(f"http://localhost:{studio.server_port}/data/b.png")
    studio.answers["/data/b.png"] = host.sent()
    assert _source(studio.url, cache).fetch(1, path) == CONTENT
    assert studio.tokens == [f"Token {TOKEN}", None]


def test_the_token_goes_along_where_label_studio_redirects_to_itself(
    studio: ImageHost, cache: DiskCache
) -> None:
    studio.answers["/data/a.png"] = host.redirect("../files/b.png")
    studio.answers["/files/b.png"] = host.sent()
    assert _source(studio.url, cache).fetch(1, "/data/a.png") == CONTENT
    assert studio.seen == [
        ("/data/a.png", f"Token {TOKEN}"),
        ("/files/b.png", f"Token {TOKEN}"),
    ]


def test_a_host_that_another_sends_us_back_from_gets_no_token_of_its_own_choice(
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
def test_an_address_that_can_be_read_in_two_ways_gets_no_token_to_another_host(
    address: str, studio: ImageHost, elsewhere: ImageHost, cache: DiskCache
) -> None:
    value = address.format(own=studio.server_port, other=elsewhere.server_port)
    with pytest.raises(ImageUnavailable):
        _source(studio.url, cache).fetch(1, value)
    studio.answers["/way"] = host.redirect(value)
    with pytest.raises(ImageUnavailable):
        _source(studio.url, cache).fetch(1, "/way")
    assert elsewhere.tokens == [None, None]


def test_no_credentials_come_from_a_netrc_file(
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
def test_under_a_sub_path_uploads_are_found_with_and_without_it(
    base: str, value: str, studio: ImageHost, cache: DiskCache
) -> None:
    studio.answers["/studio/data/upload/a.png"] = host.sent()
    assert _source(studio.url + base, cache).fetch(1, value) == CONTENT
    assert studio.seen == [("/studio/data/upload/a.png", f"Token {TOKEN}")]


def test_a_sub_path_is_not_cut_off_where_a_folder_only_begins_like_it(
    studio: ImageHost, cache: DiskCache
) -> None:
    studio.answers["/data/database/a.png"] = host.sent()
    assert _source(f"{studio.url}/data", cache).fetch(1, "/database/a.png") == CONTENT


def test_cloud_storage_under_a_sub_path_is_resolved_there(
    studio: ImageHost, cache: DiskCache
) -> None:
    studio.answers["/studio/tasks/7/resolve/"] = host.sent()
    assert _source(f"{studio.url}/studio", cache).fetch(7, "s3://bucket/a.png") == CONTENT
    assert studio.tokens == [f"Token {TOKEN}"]


@pytest.mark.parametrize("value", ["/data/upload/a.png", "s3://bucket/a.png"])
def test_without_label_studios_address_the_settings_to_make_are_named(
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
def test_what_is_no_address_is_unavailable_and_nothing_worse(
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
def test_what_label_studio_serves_is_read_from_it_under_our_address(
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
def test_other_files_of_that_host_are_read_there_without_the_token(
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
def test_the_same_path_at_another_host_is_its_own_and_gets_no_token(
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


def test_an_inline_image_is_decoded(cache: DiskCache) -> None:
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
def test_a_damaged_inline_image_is_refused(value: str, cache: DiskCache) -> None:
    with pytest.raises(ImageUnavailable, match="data:"):
        _source(None, cache).fetch(1, value)


def test_an_inline_image_has_the_same_limit_as_others(cache: DiskCache) -> None:
    source = _source(None, cache, max_bytes=1000)
    assert source.fetch(1, _data(b"x" * 1000)) == b"x" * 1000
    with pytest.raises(ImageUnavailable, match="1,000"):
        source.fetch(1, _data(b"x" * 1001))


# Limits


@pytest.mark.parametrize("answer", [host.sent, host.until_closed], ids=["with a length", "without"])
def test_an_image_of_just_the_limit_is_read_and_a_larger_one_refused(
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


def test_an_endless_answer_is_refused_at_the_limit(studio: ImageHost, cache: DiskCache) -> None:
    studio.answers["/a.png"] = host.endless
    with pytest.raises(ImageUnavailable, match="ML_BACKEND_IMAGE_MAX_BYTES"):
        _source(studio.url, cache, max_bytes=1_000_000, timeout=30).fetch(1, "/a.png")


def test_what_is_unpacked_counts_and_not_what_is_sent(studio: ImageHost, cache: DiskCache) -> None:
    studio.answers["/fits.png"] = host.sent(gzip.compress(CONTENT), Content_Encoding="gzip")
    studio.answers["/bomb.png"] = host.sent(gzip.compress(bytes(10**7)), Content_Encoding="gzip")
    source = _source(studio.url, cache)
    assert source.fetch(1, "/fits.png") == CONTENT
    with pytest.raises(ImageUnavailable, match="ML_BACKEND_IMAGE_MAX_BYTES"):
        source.fetch(1, "/bomb.png")


def test_an_address_makes_one_line_and_what_a_cloud_signed_is_not_shown(
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
def test_a_drip_at_any_place_is_given_up_within_the_timeout(
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
def test_a_slow_image_is_given_up_within_the_timeout(
    answer: Answer, studio: ImageHost, cache: DiskCache
) -> None:
    studio.answers["/slow.png"] = answer
    begun = time.monotonic()
    with pytest.raises(ImageUnavailable, match=r"/slow\.png"):
        _source(studio.url, cache, timeout=0.8).fetch(1, "/slow.png")
    # The drip alone would take 50 s.
    assert time.monotonic() - begun < 10


def test_the_timeout_holds_for_all_redirects_together(studio: ImageHost, cache: DiskCache) -> None:
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
def test_half_an_image_is_none_and_is_not_kept(
    answer: Answer, studio: ImageHost, cache: DiskCache
) -> None:
    source = _source(studio.url, cache)
    studio.answers["/a.png"] = answer
    with pytest.raises(ImageUnavailable, match=r"/a\.png"):
        source.fetch(1, "/a.png")
    studio.answers["/a.png"] = host.sent()
    assert source.fetch(1, "/a.png") == CONTENT


def test_a_redirect_loop_ends(studio: ImageHost, elsewhere: ImageHost, cache: DiskCache) -> None:
    studio.answers["/a.png"] = host.redirect(f"{elsewhere.url}/b.png")
    elsewhere.answers["/b.png"] = host.redirect(f"{studio.url}/a.png")
    with pytest.raises(ImageUnavailable, match="redirected more than"):
        _source(studio.url, cache).fetch(1, "/a.png")
    assert len(studio.seen) + len(elsewhere.seen) < 10
    assert set(elsewhere.tokens) == {None}


@pytest.mark.parametrize("location", ["file:///etc/hostname", "ftp://127.0.0.1/a", "http://["])
def test_a_redirect_to_what_is_no_web_address_is_not_followed(
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
def test_a_refusal_by_label_studio_says_what_to_do(
    path: str, status: int, advice: list[str], studio: ImageHost, cache: DiskCache
) -> None:
    studio.answers[urlsplit(path).path] = host.empty(status)
    with pytest.raises(ImageUnavailable) as caught:
        _source(studio.url, cache).fetch(1, path)
    for part in [path, str(status), *advice]:
        assert part in str(caught.value)


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_a_refusal_by_another_host_asks_for_access_without_a_login(
    status: int, studio: ImageHost, elsewhere: ImageHost, cache: DiskCache
) -> None:
    elsewhere.answers["/a.png"] = host.empty(status)
    with pytest.raises(ImageUnavailable) as caught:
        _source(studio.url, cache).fetch(1, f"{elsewhere.url}/a.png")
    assert str(status) in str(caught.value)
    assert "without a login" in str(caught.value)
    assert elsewhere.tokens == [None]


def test_a_refusal_without_a_token_names_the_settings(studio: ImageHost, cache: DiskCache) -> None:
    studio.answers["/data/upload/a.png"] = host.empty(401)
    with pytest.raises(ImageUnavailable, match="LABEL_STUDIO_API_KEY"):
        _source(studio.url, cache, token=None).fetch(1, "/data/upload/a.png")
    assert studio.tokens == [None]


def test_a_token_that_has_just_run_out_is_tried_once_more(
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
def test_nothing_but_images_is_asked_for_in_the_name_of_the_tokens_user(
    path: str, studio: ImageHost, elsewhere: ImageHost, cache: DiskCache
) -> None:
    elsewhere.answers["/back"] = host.redirect(f"{studio.url}{path}")
    source = _source(studio.url, cache)
    for value in (path, f"{studio.url}{path}", f"{elsewhere.url}/back"):
        with pytest.raises(ImageUnavailable, match="without a login"):
            source.fetch(1, value)
    assert studio.tokens == [None] * 3


def test_a_host_that_nothing_answers_at_is_named(
    make_server: Callable[[], ImageHost], cache: DiskCache
) -> None:
    gone = make_server()
    gone.shutdown()
    gone.server_close()
    with pytest.raises(ImageUnavailable, match="reachable") as caught:
        _source(None, cache).fetch(1, f"{gone.url}/a.png")
    assert gone.url in str(caught.value)


def test_no_text_holds_the_token(studio: ImageHost, cache: DiskCache) -> None:
    studio.answers["/data/drop.png"] = _hung_up
    for path in ("/data/missing.png", "/data/drop.png"):
        with pytest.raises(ImageUnavailable) as caught:
            _source(studio.url, cache).fetch(1, path)
        assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("token", ["geheim…", "geheim\r\nX-Other: a", "geheim\x00"])
def test_what_cannot_be_a_token_is_named_and_neither_sent_nor_shown(
    token: str, studio: ImageHost, cache: DiskCache
) -> None:
    with pytest.raises(ImageUnavailable, match="LABEL_STUDIO_API_KEY") as caught:
        _source(studio.url, cache, token=token).fetch(1, "/data/a.png")
    assert "geheim" not in str(caught.value)
    assert studio.seen == []


# The cache


def test_an_image_is_read_once_and_kept_for_a_later_start(
    studio: ImageHost, tmp_path: Path
) -> None:
    studio.answers["/a.png"] = host.sent()
    for _ in range(2):
        source = _source(studio.url, DiskCache(tmp_path / "images", 10**6))
        assert source.fetch(1, "/a.png") == CONTENT
        assert source.fetch(2, "/a.png") == CONTENT
    assert len(studio.seen) == 1


def test_two_label_studios_do_not_share_an_upload(
    studio: ImageHost, elsewhere: ImageHost, cache: DiskCache
) -> None:
    studio.answers["/data/upload/1/a.png"] = host.sent(b"one")
    elsewhere.answers["/data/upload/1/a.png"] = host.sent(b"two")
    assert _source(studio.url, cache).fetch(1, "/data/upload/1/a.png") == b"one"
    assert _source(elsewhere.url, cache).fetch(1, "/data/upload/1/a.png") == b"two"


def test_a_refusal_is_not_kept(studio: ImageHost, cache: DiskCache) -> None:
    source = _source(studio.url, cache)
    with pytest.raises(ImageUnavailable):
        source.fetch(1, "/a.png")
    studio.answers["/a.png"] = host.sent()
    assert source.fetch(1, "/a.png") == CONTENT


def test_a_size_of_nothing_turns_the_cache_off(studio: ImageHost, tmp_path: Path) -> None:
    studio.answers["/a.png"] = host.sent()
    source = _source(studio.url, DiskCache(tmp_path / "images", 0))
    assert source.fetch(1, "/a.png") == CONTENT
    assert source.fetch(1, "/a.png") == CONTENT
    assert len(studio.seen) == 2
    assert not (tmp_path / "images").exists()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_cache_never_outgrows_its_size(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10_000)
    for number in range(100):
        cache.put(f"image {number}", bytes(700))
        assert _size(tmp_path) <= 10_000
    assert cache.get("image 99") == bytes(700)
    # It is used, too, and not emptied each time.
    assert _size(tmp_path) > 5_000


def test_two_processes_that_share_a_cache_keep_it_near_its_size(tmp_path: Path) -> None:
    caches = [DiskCache(tmp_path, 10_000) for _ in range(2)]
    for number in range(100):
        caches[number % 2].put(f"image {number}", bytes(300))
        assert _size(tmp_path) <= 12_000


def test_what_an_earlier_start_left_counts(tmp_path: Path) -> None:
    earlier = DiskCache(tmp_path, 100_000)
    for number in range(20):
        earlier.put(f"image {number}", bytes(1_000))
    DiskCache(tmp_path, 5_000).put("new", bytes(1_000))
    assert _size(tmp_path) <= 5_000


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10_000)
    for number in range(9):
        cache.put(f"image {number}", bytes(1_000))
        time.sleep(0.02)
    for number in range(3):
        assert cache.get(f"image {number}") == bytes(1_000)
    time.sleep(0.02)
    for number in range(9, 12):
        cache.put(f"image {number}", bytes(1_000))
    kept = {number for number in range(12) if cache.get(f"image {number}") is not None}
    assert kept >= {0, 1, 2, 9, 10, 11}
    assert kept.isdisjoint({3, 4})


def test_an_image_larger_than_the_cache_is_not_kept_and_drives_nothing_out(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1_000)
    cache.put("small", bytes(500))
    cache.put("large", bytes(1_001))
    assert cache.get("large") is None
    assert cache.get("small") == bytes(500)


def test_a_key_put_again_holds_the_new_content(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1_000)
    cache.put("a", b"old")
    cache.put("a", b"new")
    assert cache.get("a") == b"new"
    assert cache.get("b") is None


def test_where_nothing_can_be_written_images_are_still_read(
    studio: ImageHost, tmp_path: Path
) -> None:
    in_the_way = tmp_path / "images"
    in_the_way.write_text("a file where the folder should be")
    studio.answers["/a.png"] = host.sent()
    source = _source(studio.url, DiskCache(in_the_way, 10**6))
    assert source.fetch(1, "/a.png") == CONTENT
    assert source.fetch(1, "/a.png") == CONTENT
    assert len(studio.seen) == 2


def test_threads_that_share_a_cache_read_whole_images_only(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 50_000)
    damaged: list[str] = []

    def work(seed: int) -> None:
        for step in range(60):
            letter = chr(ord("a") + (seed * 7 + step) % 20)
            found = cache.get(letter)
            if found is not None and found != letter.encode() * 5_000:
                damaged.append(letter)
            cache.put(letter, letter.encode() * 5_000)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert damaged == []
    assert _size(tmp_path) <= 50_000
