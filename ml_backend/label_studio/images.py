"""Reads the images of tasks from wherever Label Studio stores them.

Label Studio's token is sent to Label Studio's own address only. So redirects are followed here, and
the token is left out where one leads to another host. `addresses.Guard` decides which addresses may
be connected to.
"""

from __future__ import annotations

import base64
import re
import threading
import time
from collections.abc import Iterable
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

import requests
from urllib3.exceptions import HTTPError, LocationParseError
from urllib3.util import parse_url

from ml_backend.label_studio.addresses import AddressRefused, Guard, origin_of
from ml_backend.label_studio.client import LabelStudioClient
from ml_backend.label_studio.connections import DeadlineAdapter
from ml_backend.label_studio.disk_cache import DiskCache
from ml_backend.label_studio.errors import LabelStudioError
from ml_backend.label_studio.transport import without_netrc

REDIRECTS = 5
_CHUNK = 64 * 1024
_CLOUD = ("s3://", "gs://", "azure-blob://")
_SERVED = ("/data/local-files/", "/data/upload/")
"""Paths of files that Label Studio itself serves."""
_WITH_TOKEN = re.compile(r"/(data|storage-data|(tasks|projects)/\d+/(resolve|presign))/")
"""Paths of a task's files that Label Studio serves to authorised users."""
_SHOWN = 200
"""Characters of an address that a message shows."""


class ImageUnavailable(RuntimeError):
    """An image cannot be read; the text says why, and the remedy."""


class ImageSource:
    """Reads the images of the tasks of one Label Studio.

    Args:
        base_url: Label Studio's address, including its sub-path; None if it is not known.
        client: authorises requests to Label Studio; None if no token is known.
        cache: keeps the images.
        max_bytes: a larger image is refused.
        timeout: seconds that the transfer of one image may take in all.
        other_urls: other addresses of the same Label Studio, which it writes into tasks
            (LABEL_STUDIO_HOST on its side).
        allowed_hosts: hosts and networks that are not public, and that images may come from.
    """

    def __init__(
        self,
        base_url: str | None,
        client: LabelStudioClient | None,
        cache: DiskCache,
        *,
        max_bytes: int,
        timeout: float,
        other_urls: Iterable[str] = (),
        allowed_hosts: Iterable[str] = (),
    ) -> None:
        self._other_urls = tuple(other_urls)
        self._base_url = base_url.rstrip("/") if base_url else None
        self._guard = Guard([self._base_url] if self._base_url else [], allowed_hosts)
        self._client = client
        self._cache = cache
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._local = threading.local()

    def fetch(self, task_id: int | None, value: str) -> bytes:
        """Reads one image, still encoded.

        Args:
            task_id: Label Studio's id of the task; images in cloud storage need it.
            value: the image's address in the task's data.

        Raises:
            ImageUnavailable: the image cannot be read.
        """
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ImageUnavailable(f"{value[:100]!r} is no address of an image") from error
        if value.startswith("data:"):
            return _inline(value, self._max_bytes)
        key = f"{self._base_url} {value}"
        content = self._cache.get(key)
        if content is None:
            content = self._download(self._address(task_id, value))
            self._cache.put(key, content)
        return content

    def route_of(self, value: str) -> str:
        """Describes in words where an image is read from."""
        if value.startswith("data:"):
            return "inline"
        if value.startswith(_CLOUD):
            return "from cloud storage, by way of Label Studio"
        value = self._served(value) or value
        if value.startswith(("http://", "https://")):
            return "from its own address"
        if "/data/local-files/" in value:
            return "from local files, by way of Label Studio"
        return "an upload, from Label Studio"

    def _served(self, value: str) -> str | None:
        """The path of an address at which Label Studio serves a file; None for other addresses.

        The host in the address may be reachable from browsers only.
        """
        if not value.startswith(("http://", "https://")):
            return None
        for url in (self._base_url, *self._other_urls):
            path = _below(value, url)
            if path is not None and path.startswith(_SERVED):
                return path
        return None

    def _address(self, task_id: int | None, value: str) -> str:
        if self._base_url is not None and (path := self._served(value)) is not None:
            return self._base_url + path
        if value.startswith(("http://", "https://")):
            return value
        if self._base_url is None:
            raise ImageUnavailable(
                f"{_named(value)} lies in Label Studio, whose address is not known: set "
                "LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY"
            )
        if value.startswith(_CLOUD):
            if task_id is None:
                raise ImageUnavailable(f"{_named(value)} can only be read for a task with an id")
            encoded = base64.urlsafe_b64encode(value.encode()).decode()
            return f"{self._base_url}/tasks/{task_id}/resolve/?fileuri={encoded}"
        if not value.startswith("/"):
            raise ImageUnavailable(
                f"{value[:100]!r} is no address of an image: it must begin with http://, "
                "https://, /data/, s3://, gs://, azure-blob:// or data:"
            )
        path = urlsplit(self._base_url).path
        # Label Studio may or may not have added its sub-path already.
        if path and value.startswith(f"{path}/"):
            value = value.removeprefix(path)
        return self._base_url + value

    def _download(self, url: str) -> bytes:
        deadline = time.monotonic() + self._timeout
        try:
            with self._adapter.within(self._timeout):
                return self._follow(url, deadline)
        except requests.Timeout as error:
            raise ImageUnavailable(
                f"{_named(url)} took longer than {self._timeout:g} s: raise "
                "ML_BACKEND_IMAGE_TIMEOUT, or look why it is slow"
            ) from error

    def _follow(self, url: str, deadline: float) -> bytes:
        address, redirects, refreshed = url, 0, False
        authorised = self._takes_token(address)
        while redirects <= REDIRECTS:
            try:
                with self._get(address, deadline, authorised) as response:
                    if response.is_redirect:
                        redirects += 1
                        address = urljoin(address, response.headers["Location"])
                        # A path that Label Studio itself redirects to needs authorisation too.
                        authorised = _below(address, self._base_url) is not None and (
                            authorised or self._takes_token(address)
                        )
                        if not address.startswith(("http://", "https://")):
                            raise ImageUnavailable(
                                f"{_named(url)} is redirected to {_named(address)}"
                            )
                        continue
                    if response.status_code == 401 and authorised and not refreshed:
                        refreshed = True
                        if self._client is not None:
                            self._client.refresh_auth()
                            continue
                    if response.status_code >= 400:
                        raise ImageUnavailable(
                            self._refused(address, response.status_code, authorised)
                        )
                    content = self._read(address, response)
                    if content.lstrip()[:1] == b"<":
                        # A login page, or the error page of a proxy, must not be cached.
                        raise ImageUnavailable(
                            f"{_named(address)} answers with a page, and no image"
                        )
                    return content
            except requests.ReadTimeout:
                # It took all the remaining time: `_download` turns this into the error.
                raise
            except AddressRefused as error:
                raise ImageUnavailable(f"{_named(address)} is not read: {error}") from error
            except (requests.RequestException, HTTPError, ValueError) as error:
                # While the body is read, errors are those of urllib3. A ValueError means that the
                # address is invalid.
                raise ImageUnavailable(
                    f"{_named(address)} cannot be read ({type(error).__name__}): it must be "
                    "reachable from this machine"
                ) from error
        raise ImageUnavailable(f"{_named(url)} is redirected more than {REDIRECTS} times")

    def _get(self, address: str, deadline: float, authorised: bool) -> requests.Response:
        headers = {}
        if self._client is not None and authorised:
            try:
                headers = self._client.auth_headers()
            except LabelStudioError as error:
                raise ImageUnavailable(str(error)) from error
        left = max(0.1, deadline - time.monotonic())
        return self._adapter.session.get(
            address,
            headers=headers,
            stream=True,
            allow_redirects=False,
            timeout=(min(3.05, left), left),
            auth=without_netrc,
        )

    def _read(self, address: str, response: requests.Response) -> bytes:
        parts: list[bytes] = []
        size = 0
        for part in self._parts(response):
            size += len(part)
            if size > self._max_bytes:
                raise ImageUnavailable(
                    f"{_named(address)} is larger than {self._max_bytes:,} bytes: raise "
                    "ML_BACKEND_IMAGE_MAX_BYTES, or use smaller images"
                )
            parts.append(part)
        return b"".join(parts)

    @staticmethod
    def _parts(response: requests.Response) -> Iterable[bytes]:
        # `read1` returns the bytes that have arrived. Waiting for a whole chunk could exceed the
        # deadline if they come slowly.
        while part := response.raw.read1(_CHUNK, decode_content=True):
            yield part

    @property
    def _adapter(self) -> DeadlineAdapter:
        if not hasattr(self._local, "adapter"):
            self._local.adapter = self._guard.adapter()
        adapter = self._local.adapter
        assert isinstance(adapter, DeadlineAdapter)
        return adapter

    def _takes_token(self, address: str) -> bool:
        """Whether Label Studio serves images at an address.

        Other addresses that people write into tasks must not be requested with the user's token.
        """
        path = _below(address, self._base_url)
        return path is not None and _WITH_TOKEN.match(path) is not None

    def _refused(self, address: str, status: int, authorised: bool) -> str:
        what = f"{_named(address)} answers status {status}"
        if not authorised:
            return f"{what}: it must be readable without a login"
        if self._client is None:
            return f"{what}: set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY"
        if "/data/local-files/" in address:
            return (
                f"{what}: the token's user needs a project with that local storage, and Label "
                "Studio LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true"
            )
        if status in (401, 403):
            return f"{what}: the user of LABEL_STUDIO_API_KEY may not see it"
        return f"{what}: is the file still there?"


def _below(address: str, base: str | None) -> str | None:
    """The path and query of an address below Label Studio's; None if it is not below it."""
    try:
        if base is None or origin_of(address) != origin_of(base):
            return None
        # This resolves the dots of /data/upload/../, as a request does.
        path = parse_url(address).request_uri
        prefix = (parse_url(base).path or "").rstrip("/")
    except LocationParseError:
        return None
    # Label Studio may or may not have added its sub-path.
    return path.removeprefix(prefix) if path.startswith(f"{prefix}/") else path


def _named(address: str) -> str:
    """Shortens an address for messages, to one line and without a cloud's signature."""
    start, mark, query = address.partition("?")
    shown = start if mark and "sign" in query.lower() else address
    text = "".join(letter if letter.isprintable() else "?" for letter in shown[:_SHOWN])
    return text if shown == address and len(address) <= _SHOWN else f"{text}…"


def _inline(value: str, max_bytes: int) -> bytes:
    head, comma, body = value.partition(",")
    if not comma or not head.startswith("data:image/"):
        raise ImageUnavailable("the data: address holds no image")
    try:
        if head.endswith(";base64"):
            content = base64.b64decode(body, validate=True)
        else:
            content = unquote_to_bytes(body)
    except ValueError as error:
        raise ImageUnavailable(f"the data: address is damaged: {error}") from error
    if len(content) > max_bytes:
        raise ImageUnavailable(f"the data: address holds more than {max_bytes:,} bytes")
    return content
