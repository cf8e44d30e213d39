"""Media of strangers: addresses that must not be reached, bodies without an end, images of too many pixels."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import socket
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")

import threading

import PIL.Image

from engines import EngineError, load_engine, media
from engines.config import EngineConfig, packaged
from engines.errors import ConfigError
from engines.fetch import FetchLimits, fetch, is_allowed, parse_networks
from engines.local.images import open_image
from engines.media import load_media
from engines.remote.engine import RemoteEngine
from engines.types import Request
from tests.support.batch_server import BatchServer
from tests.support.media_server import MediaServer
from tests.support.provider_server import ProviderServer

LOOPBACK = ["127.0.0.1"]


def png(width: int = 8, height: int = 8, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    PIL.Image.new(mode, (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def server() -> Iterator[MediaServer]:
    with MediaServer(png()) as running:
        yield running


def get(url: str, *networks: str, max_bytes: int = 1 << 20, timeout_s: float = 60.0) -> bytes:
    limits = FetchLimits(parse_networks(networks), max_bytes, timeout_s)
    return asyncio.run(fetch([url], limits))[url].data


def refused(url: str, *networks: str, **limits: Any) -> str:
    with pytest.raises(EngineError) as error:
        get(url, *networks, **limits)
    assert error.value.type == "invalid_input"
    return str(error.value)


# -- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254",
     "169.254.169.254",
     "168.63.129.16", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.1.1",
     "198.18.0.1",
     "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255",
     "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:10.1.2.3", "::ffff:0:127.0.0.1", "64:ff9b::7f00:1",
     "64:ff9b::169.254.169.254", "64:ff9b:1::a00:1", "100::1", "2001::7f00:1", "2001:db8::1", "2002:7f00:1::",
     "2002:a9fe:a9fe::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%1", "fec0::1", "ff02::1"],
)  # fmt: skip
def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    assert not is_allowed(ip_address(address), ())


@pytest.mark.parametrize(
    "address",
    ["1.1.1.1", "8.8.8.8", "172.32.0.1", "192.167.0.1", "2606:4700:4700::1111", "2001:4860:4860::8888",
     "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1"],
)  # fmt: skip
def test_public_addresses_are_allowed(address: str) -> None:
    assert is_allowed(ip_address(address), ())


def test_a_private_network_can_be_allowed() -> None:
    networks = parse_networks(["10.0.0.0/8", "::1"])
    assert all(is_allowed(ip_address(each), networks) for each in ("10.1.2.3", "::ffff:10.1.2.3", "::1", "1.1.1.1"))
    assert not any(is_allowed(ip_address(each), networks) for each in ("11.0.0.0", "192.168.0.1")[1:])
    assert parse_networks("10.1.2.3/8") == parse_networks(["10.0.0.0/8"])
    with pytest.raises(ConfigError, match=r"engine.media_private_networks must be a network such as 10.0.0.0/8"):
        load_engine("echo", media_private_networks=["localhost"])


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f.1", "0x7f000001", "017700000001", "0177.0.0.1", "0.0.0.0", "0",
     "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:0:0:1]", "[64:ff9b::7f00:1]", "localhost",
     "localhost.", "LOCALHOST", "LocalHost.", "127.0.0.1.", "user@127.0.0.1", "１２７.0.0.1", "127。0。0。1"],
)  # fmt: skip
def test_this_machine_is_not_reached_by_any_spelling(server: MediaServer, host: str) -> None:
    server.hits.clear()
    assert "cannot be fetched" in refused(f"http://{host}:{server.port}/image")
    assert not server.hits


def test_the_spellings_reach_this_machine_where_it_is_allowed(server: MediaServer) -> None:
    """So the test above refuses what would have worked."""
    for host in ("127.0.0.1", "0x7f.1", "0x7f000001", "0.0.0.0", "[::ffff:7f00:1]", "LOCALHOST", "１２７.0.0.1"):
        assert get(f"http://{host}:{server.port}/image", "127.0.0.0/8", "::1", "0.0.0.0") == server.image


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[str]]]:
    """The addresses of made-up names: what each look-up gives, the last one for ever."""
    known: dict[str, list[list[str]]] = {}
    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in known:
            return look_up(host, port, *args, **kwargs)
        found = known[host].pop(0) if len(known[host]) > 1 else known[host][0]
        return [answer for address in found for answer in look_up(address, port, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return known


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "10.0.0.1", "169.254.169.254", "0.0.0.0"])
def test_a_name_of_a_private_address_is_refused_as_a_name_without_any(
    server: MediaServer, names: dict[str, list[list[str]]], address: str
) -> None:
    names["127.0.0.1.nip.test"] = [[address]]
    server.hits.clear()
    said = refused(f"http://127.0.0.1.nip.test:{server.port}/image")
    unknown = refused(f"http://nowhere.invalid:{server.port}/image")
    assert said.replace("127.0.0.1.nip.test", "nowhere.invalid") == unknown
    assert address not in said.replace("127.0.0.1.nip.test", "")
    assert not server.hits


def test_a_name_that_changes_its_address_is_checked_where_it_connects(names: dict[str, list[list[str]]]) -> None:
    with MediaServer(png(), host="127.0.0.2") as public, MediaServer(png(), port=public.port) as private:
        # An allowed address for whoever looks first, a private one for whoever looks again.
        names["rebind.test"] = [["127.0.0.2"], ["127.0.0.1"]]
        assert get(f"http://rebind.test:{public.port}/image", "127.0.0.2") == public.image
        names["rebind.test"] = [["127.0.0.2"], ["127.0.0.1"]]
        url = f"http://rebind.test:{public.port}"
        # The redirect leaves the connection and so looks again.
        names["again.test"] = [["127.0.0.1"]]
        assert "has no public address" in refused(f"{url}/to?url=http://again.test:{public.port}/image", "127.0.0.2")
        names["both.test"] = [["127.0.0.1", "127.0.0.2"]]
        assert get(f"http://both.test:{public.port}/image", "127.0.0.2") == public.image
        assert not private.hits


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    ("target", "said"),
    [("http://169.254.169.254/latest/meta-data/", "http://169.254.169.254/latest/meta-data/ cannot be fetched: "
      "'169.254.169.254' has no public address"),
     ("http://127.0.0.2:{port}/image", "'127.0.0.2' has no public address"),
     ("//0x7f.2:{port}/image", "has no public address"),
     ("file:///etc/passwd", "only http:// and https://"), ("FILE:/etc/passwd", "only http:// and https://"),
     ("ftp://127.0.0.1/x", "only http:// and https://"), ("gopher://127.0.0.1:{port}/", "only http:// and https://"),
     ("data:image/png;base64,AAAA", "only http:// and https://"), ("http://[", "cannot be fetched")],
)  # fmt: skip
def test_each_redirect_is_checked(server: MediaServer, status: int, target: str, said: str) -> None:
    server.hits.clear()
    target = target.format(port=server.port).replace("%", "%25")
    assert said in refused(f"{server.url}/to?status={status}&url={target}", *LOOPBACK)
    assert server.hits == {"to": 1}


def test_redirects_are_followed_a_few_times(server: MediaServer) -> None:
    assert get(f"{server.url}/to?url=/image", *LOOPBACK) == server.image
    assert get(f"{server.url}/to?url=to%3Furl=/image", *LOOPBACK) == server.image
    server.hits.clear()
    assert "more than 5 redirects" in refused(f"{server.url}/loop", *LOOPBACK)
    assert server.hits == {"loop": 6}


@pytest.mark.parametrize("url", ["http://", "http:///x", "http://:80/", "https://[::1", "http://a b/", "http://x:99999/"])
def test_an_address_that_is_not_valid_is_refused(url: str) -> None:
    assert "cannot be fetched" in refused(url)


# -- sizes and times --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["", "?declared"])
def test_ten_gigabytes_are_left_where_they_are(server: MediaServer, query: str) -> None:
    server.sent = 0
    assert "has more than engine.media_max_bytes=100000 bytes" in refused(
        f"{server.url}/endless{query}", *LOOPBACK, max_bytes=100_000
    )
    assert server.sent < 64 << 20  # what the sockets hold


@pytest.mark.parametrize("name", ["drip", "silent"])
def test_a_body_or_a_head_that_never_ends_is_given_up(server: MediaServer, name: str) -> None:
    said = refused(f"{server.url}/{name}?X-Signature=s3cr3t", *LOOPBACK, timeout_s=0.5)
    assert said == f"{server.url}/{name} cannot be fetched within engine.media_timeout_s=0.5"


def test_what_a_server_says_is_passed_on_without_secrets(server: MediaServer) -> None:
    url = server.url.replace("//", "//user:pa55word@")
    assert refused(f"{url}/missing?sig=s3cr3t", *LOOPBACK) == (
        f"{server.url}/missing cannot be fetched: the server answered with status 404"
    )
    assert "compressed" in refused(f"{server.url}/gzip", *LOOPBACK)


# -- requests ---------------------------------------------------------------------------------------------------------


def request(*parts: dict[str, Any]) -> Request:
    return Request([{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}])  # type: ignore[list-item]


def image(url: str, key: str = "image_url", kind: str | None = None, **more: Any) -> dict[str, Any]:
    return {"type": kind or key, key: {"url": url}, **more}


def loaded(asked: Request, *, fetches: bool = True, **keys: Any) -> Any:
    config = EngineConfig("x", media_private_networks=LOOPBACK, **keys)
    found = asyncio.run(load_media(asked, config, fetches=fetches, inspect=lambda data: None))
    return found.messages[0]["content"]


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def test_media_become_data_urls_whatever_their_part_is_called(server: MediaServer, tmp_path: Path) -> None:
    file = tmp_path / "a b.png"
    file.write_bytes(server.image)
    asked = request(
        image(f"{server.url}/image", detail="low"), image(str(file)), image(file.as_uri()), image(data_url(server.image)),
        {"type": "image_url", "image_url": f"{server.url}/image"},
        {"type": "text", "text": "x", "uuid": "1", "image_url": f"{server.url}/image"},  # read by vLLM as an image
        image(f"{server.url}/image".replace("http", "HTTP", 1)),
    )  # fmt: skip
    found = loaded(asked)
    urls = [part["image_url"] for part in found[:-1]]
    assert {url if isinstance(url, str) else url["url"] for url in urls} == {data_url(server.image)}
    assert found[0]["detail"] == "low" and found[5]["text"] == "x"
    kept = loaded(asked, fetches=False)
    assert [part["image_url"] for part in kept[:2]] == [{"url": f"{server.url}/image"}, {"url": data_url(server.image)}]


def test_a_part_without_media_may_have_the_keys() -> None:
    part = {"type": "text", "text": "x", "image_url": None, "audio_url": "", "video_url": None}
    assert loaded(request(part))[0] == part
    asked = Request([{"role": "user", "content": "Hi"}], turns=["And?", ["not a part"]])
    found = asyncio.run(load_media(asked, EngineConfig("x"), fetches=True, inspect=lambda data: None))
    assert found.turns == asked.turns


def test_the_media_of_later_turns_are_loaded_too(server: MediaServer) -> None:
    asked = Request([{"role": "user", "content": "Hi"}], turns=["And?", [image(f"{server.url}/image")]])
    config = EngineConfig("x", media_private_networks=LOOPBACK)
    found = asyncio.run(load_media(asked, config, fetches=True, inspect=lambda data: None))
    assert found.turns == ["And?", [image(data_url(server.image))]]
    assert found.messages == asked.messages


def test_sound_and_film_are_fetched_by_the_same_rules() -> None:
    with MediaServer(b"RIFF----WAVE", "audio/wav") as server:
        found = loaded(request(image(f"{server.url}/a", "audio_url"), image(f"{server.url}/b.mp4", "video_url")))
        assert found[0]["audio_url"]["url"] == data_url(b"RIFF----WAVE", "audio/wav")
        assert found[1]["video_url"]["url"] == data_url(b"RIFF----WAVE", "video/mp4")
        with pytest.raises(EngineError, match="is not a PNG, JPEG, GIF or WebP image"):
            loaded(request(image(f"{server.url}/a")))
        with pytest.raises(EngineError, match="has no public address"):
            loaded(request(image(f"http://127.0.0.2:{server.port}/a", "audio_url")))


def test_files_are_read_as_far_as_the_limit_and_devices_not_at_all(tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.write(png())
        file.truncate(10 * 10**9)  # a file with a hole
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    for path, said in ((large, "has more than engine.media_max_bytes=5000 bytes"), (Path("/dev/zero"), "is not a file"),
                       (pipe, "is not a file"), (tmp_path, "is not a file")):  # fmt: skip
        with pytest.raises(EngineError, match=said):
            loaded(request(image(str(path))), media_max_bytes=5000)
    with pytest.raises(EngineError, match="the image has more than engine.media_max_bytes=5000 bytes"):
        loaded(request(image(data_url(png() + bytes(5000)))), media_max_bytes=5000)


# -- decoding ---------------------------------------------------------------------------------------------------------


def test_a_small_file_of_many_pixels_is_refused_before_it_is_decoded() -> None:
    bomb = png(9000, 9000, "1")
    assert len(bomb) < 100_000
    with pytest.raises(EngineError, match="an image has more than engine.media_max_pixels=64000000 pixels"):
        open_image(bomb, 64_000_000)
    assert open_image(bomb, 81_000_000).size == (9000, 9000)
    with pytest.raises(EngineError, match="more than engine.media_max_pixels"):  # beyond Pillow's own limit
        open_image(png(20_000, 10_000, "1"), 178_956_970)


@pytest.mark.parametrize("kind", ["EPS", "TIFF", "BMP", "PPM"])
def test_other_formats_than_the_four_are_refused(kind: str) -> None:
    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(file, kind)
    with pytest.raises(EngineError, match="is not a PNG, JPEG, GIF or WebP file"):
        open_image(file.getvalue(), 1000)
    for good in ("PNG", "JPEG", "GIF", "WEBP"):
        file = io.BytesIO()
        PIL.Image.new("RGB", (8, 8)).save(file, good)
        assert open_image(file.getvalue(), 1000).convert("RGB").size == (8, 8)


def test_a_large_image_is_read_and_encoded_beside_the_event_loop(
    tmp_path: Path, server: MediaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, str] = {}

    def noted(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            threads[name] = threading.current_thread().name
            return work(*args)

        return call

    large = tmp_path / "large.png"
    large.write_bytes(png() + bytes(3 << 20))
    monkeypatch.setattr(media, "_data_url", noted("read", media._data_url))
    with (
        ProviderServer() as provider,
        load_engine("openai_compatible", model="m", base_url=provider.url) as engine,
    ):
        assert isinstance(engine, RemoteEngine)
        monkeypatch.setattr(engine, "_content", noted("encode", engine._content))
        assert engine.infer([{"messages": request(image(str(large))).messages}])[0].error is None
    assert threads.keys() == {"read", "encode"}
    assert all(name.startswith("eagleray-media") for name in threads.values())


# -- engines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["openai_compatible", "remote_vllm", "sglang"])
def test_a_server_of_ones_own_gets_the_data_and_no_address(server: MediaServer, kind: str) -> None:
    with ProviderServer() as provider:
        keys: dict[str, Any] = {"model": "m", "base_url": provider.url}
        asked = [{"messages": request(image(f"{server.url}/image")).messages}]
        with load_engine(kind, **keys, media_private_networks=LOOPBACK) as engine:
            assert engine.infer(asked)[0].error is None
        assert json.dumps(provider.requests[-1].body).count(data_url(server.image)) == 1
        assert server.url not in json.dumps(provider.requests[-1].body)
        with load_engine(kind, **keys) as engine:
            error = engine.infer(asked)[0].error
        assert error is not None and error.type == "invalid_input" and "has no public address" in error.message
        assert len(provider.requests) == 1


def test_a_provider_gets_the_address(server: MediaServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-0123456789")
    server.hits.clear()
    with ProviderServer() as provider, load_engine("openai", model="gpt-4o-mini", base_url=provider.url) as engine:
        asked = request(image(f"{server.url}/image"))
        assert engine.infer([{"messages": asked.messages}])[0].error is None
        assert provider.requests[0].body["messages"][0]["content"] == asked.messages[0]["content"]
    assert not server.hits


@pytest.mark.parametrize("fetches", [True, False])
def test_a_batch_holds_the_data_where_the_server_fetches_nothing(
    server: MediaServer, monkeypatch: pytest.MonkeyPatch, fetches: bool
) -> None:
    monkeypatch.setenv("A_KEY", "sk-test-0123456789")
    asked = request(image(f"{server.url}/image"))
    with BatchServer() as provider:
        keys: dict[str, Any] = {"model": "m", "base_url": f"{provider.url}/v1", "api_key_env": "A_KEY"}
        settings = packaged("openai_compatible")["provider"] | {"fetches_media": fetches}
        with load_engine("openai_compatible", **keys, provider=settings, media_private_networks=LOOPBACK) as engine:
            engine.infer_batch([{"messages": asked.messages}], {"max_tokens": 9})
        (body,) = provider.bodies
    url = f"{server.url}/image" if fetches else data_url(server.image)
    assert body["messages"][0]["content"][0]["image_url"]["url"] == url
