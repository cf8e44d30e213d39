"""Keys change exactly when the request does."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines import file_digest
from engines.config import EngineConfig, config_from_keys
from engines.errors import EngineError
from engines.params import GenerationParams
from pipeline.dataset.formats import Parsed
from pipeline.dataset.keys import RequestHasher

ENGINE = EngineConfig(kind="llamacpp", model="m")


def parsed(text: Any = "hi", **more: Any) -> Parsed:
    values = {"id": None, "generation": {}, "model": None, "adapter": None, **more}
    return Parsed(messages=[{"role": "user", "content": text}], **values)


def key(engine: EngineConfig = ENGINE, row: Parsed | None = None, place: str = "f:1", **generation: Any) -> bytes:
    return RequestHasher(engine, GenerationParams.parse(generation)).key(row or parsed(), place)


@pytest.mark.parametrize(
    "change",
    [
        {"engine": dataclasses.replace(ENGINE, model="other")},
        {"engine": dataclasses.replace(ENGINE, adapter="a")},
        {"engine": dataclasses.replace(ENGINE, revision="r")},
        {"engine": dataclasses.replace(ENGINE, base_url="https://api.example.com/v1")},
        {"engine": dataclasses.replace(ENGINE, extra_body={"a": 1})},
        {"engine": dataclasses.replace(ENGINE, kwargs={"chat_template": "t"})},
        {"engine": dataclasses.replace(ENGINE, kwargs={"type_k": "q8_0"})},
        {"engine": dataclasses.replace(ENGINE, kwargs={"type_v": "q8_0"})},
        {"engine": dataclasses.replace(ENGINE, kwargs={"yarn_ext_factor": 1.0})},
        {"engine": dataclasses.replace(ENGINE, kwargs={"load_format": "dummy"})},
        {"engine": dataclasses.replace(ENGINE, kwargs={"sampling_defaults": "openai"})},
        {"temperature": 0.5},
        {"max_tokens": 5},
        {"row": parsed("ho")},
        {"row": parsed(generation={"seed": 1})},
        {"row": parsed(model="x")},
        {"row": parsed(adapter="x")},
    ],
)
def test_what_changes_the_answer_changes_the_key(change: dict[str, Any]) -> None:
    assert key(**change) != key()


@pytest.mark.parametrize(
    "change",
    [
        {"max_concurrency": 7},
        {"max_retries": 0},
        {"timeout_s": 1.0},
        {"requests_per_minute": 5.0},
        {"api_key_env": "SECRET"},
        {"headers": {"x": "secret"}},
        {"kwargs": {"n_gpu_layers": 3}},
        {"base_url": "http://localhost:8000/v1"},
        {"base_url": "http://10.1.2.3:8000"},
        {"base_url": ["gpu-17:8000", "gpu-18:8000"]},
        {"base_url": "https://llm.team.internal/v1"},
    ],
)
def test_what_only_changes_the_speed_does_not(change: dict[str, Any]) -> None:
    assert key(dataclasses.replace(ENGINE, **change)) == key()


def test_any_attribute_of_a_transformers_config_changes_the_key_and_the_place_of_the_weights_does_not() -> None:
    engine = EngineConfig(kind="transformers", model="m")
    assert key(dataclasses.replace(engine, kwargs={"sliding_window": 64})) != key(engine)
    assert key(dataclasses.replace(engine, kwargs={"device_map": "cpu", "max_batch_size": 4})) == key(engine)


@pytest.mark.parametrize("kind", ["remote_vllm", "sglang"])
def test_the_address_of_a_server_of_ones_own_is_no_part_of_the_key(kind: str) -> None:
    def asked(base_url: str) -> bytes:
        return key(config_from_keys(kind, {"model": "m", "base_url": base_url}))

    assert asked("https://a1b2.proxy.example.com/v1") == asked("http://127.0.0.1:8000")


def test_two_services_with_one_model_name_have_different_keys() -> None:
    urls = ("https://api.one.com/v1", "https://api.two.com/v1")
    keys = {key(config_from_keys("openai_compatible", {"model": "m", "base_url": url})) for url in urls}
    assert len(keys) == 2


# Computed by commit 779e283, the last one with version 1 of the keys.
OWN = EngineConfig(
    kind="openai_compatible", model="m", base_url="http://10.0.0.7:8000/v1", provider={"wire": "chat", "auth": "optional"}
)
OPENAI = EngineConfig(kind="openai", model="gpt-5-nano", base_url="https://api.openai.com/v1", provider={"wire": "chat"})
TEMPLATE = EngineConfig(kind="llamacpp", model="m", kwargs={"chat_template": "{{ x }}", "n_ctx": 512})
VERSION_1: list[tuple[EngineConfig, dict[str, Any], dict[str, Any], str]] = [
    (OPENAI, {}, {}, "663b3eee59b3b2c86c26a9f2370af7d1c16828a2d7380dd85a3c0c7a2e2a5f30"),
    (TEMPLATE, {}, {"max_tokens": 5}, "4d03f6d77d9ae67beb5352256cfdb67ae8910363e6c25f30e17ff1f02e406fb9"),
    (TEMPLATE, {"id": "a"}, {"temperature": 1}, "7666914a6bbe54ff7e7ea725d9fef981001895ea71b57f8bf0ab662eb31c562b"),
    (TEMPLATE, {}, {"temperature": 1}, "81e29b85b5576de963dfd2793546fecaf10806d0d3bc5d9b3763b44eec202805"),
]


@pytest.mark.parametrize(("engine", "row", "generation", "expected"), VERSION_1)
def test_keys_of_earlier_versions_are_the_same_where_nothing_of_them_is_wrong(
    engine: EngineConfig, row: dict[str, Any], generation: dict[str, Any], expected: str
) -> None:
    assert key(engine, parsed(**row), **generation).hex() == expected
    hasher = RequestHasher(engine, GenerationParams.parse(generation))
    assert hasher.old_key(parsed(**row), "f:1", sys.maxsize) is None


def test_a_row_has_the_key_of_an_earlier_version_beside_one_that_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = RequestHasher(OWN, GenerationParams())
    old = own.old_key(parsed(), "f:1", sys.maxsize)
    assert old is not None and old.hex() == "24e1fdc6e58f3d63e1c5e2ce999eb2e06644d1a2da36b5f2c178addcc7998bc1"
    assert old != own.key(parsed(), "f:1")
    cache = RequestHasher(dataclasses.replace(ENGINE, kwargs={"type_k": "q8_0"}), GenerationParams())
    old = cache.old_key(parsed(), "f:1", sys.maxsize)
    assert old is not None and old.hex() == "bfb3cd77f144dec31da7d67841a3d97f72e0dfd4456790e1dfdbe4a0dae99a85"
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "images" / "red.png", b"red", at=50)
    row = parsed([{"type": "text", "text": "what?"}, image("images/red.png")], adapter="x", turns=["more"])
    hasher = RequestHasher(TEMPLATE, GenerationParams())
    old = hasher.old_key(row, "f:1", 60_000)
    assert old is not None and old.hex() == "918e6390be485b465ad3dccd0eb0a4e7752116c1f1eb8eda157f965af876c34b"
    assert hasher.old_key(row, "f:1", 40_000) is None  # the answer may be to the image before its change


def write(path: Path, content: bytes, at: float | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if at is not None:
        os.utime(path, (at, at))
    return path


def image(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def test_the_content_of_a_chat_template_counts_and_its_path_does_not(tmp_path: Path) -> None:
    def asked(path: Path) -> bytes:
        return key(dataclasses.replace(ENGINE, kwargs={"chat_template": str(path)}))

    first = asked(write(tmp_path / "a.jinja", b"{{ messages }}"))
    assert asked(write(tmp_path / "b" / "moved.jinja", b"{{ messages }}")) == first
    assert asked(write(tmp_path / "a.jinja", b"{{ messages }}.")) != first
    assert asked(write(tmp_path / "a.jinja", b"{{ messages }}")) == first


@pytest.mark.parametrize("part", ["image_url", "audio_url", "video_url"])
def test_the_content_of_a_media_file_counts_and_its_path_does_not(tmp_path: Path, part: str) -> None:
    def asked(url: str, flat: bool = False) -> bytes:
        return key(row=parsed([{"type": part, part: url if flat else {"url": url}}]))

    path = write(tmp_path / "a.bin", b"one")
    first = asked(str(path))
    assert asked(path.as_uri()) == first
    assert asked(str(write(tmp_path / "c d" / "b.bin", b"one"))) == first
    assert asked((tmp_path / "c d" / "b.bin").as_uri(), flat=True) == asked(str(path), flat=True)
    write(path, b"two", at=1)
    assert asked(str(path)) != first
    assert key(row=parsed(turns=[[image(str(path))]])) != key(row=parsed(turns=[[image(str(tmp_path / "c d" / "b.bin"))]]))


def test_media_that_cannot_be_read_count_with_their_text(tmp_path: Path) -> None:
    names = [str(tmp_path / "none.png"), str(tmp_path), "/dev/zero", "a\0b", "~nobody-here/x.png", "https://x/y.png"]
    keys = [key(row=parsed([image(name)])) for name in names]
    assert len(set(keys)) == len(names)
    assert keys == [key(row=parsed([image(name)])) for name in names]


def test_a_changed_adapter_or_model_on_this_machine_is_another_one(tmp_path: Path) -> None:
    def adapted(path: Path, row: bool = False) -> bytes:
        engine = EngineConfig(kind="vllm", model="m", adapter=None if row else str(path))
        return key(engine, parsed(adapter=str(path)) if row else parsed())

    for name in ("a", "b"):
        write(tmp_path / name / "adapter_config.json", b"{}")
        write(tmp_path / name / "adapter_model.safetensors", b"weights")
    first, in_row = adapted(tmp_path / "a"), adapted(tmp_path / "a", row=True)
    assert (adapted(tmp_path / "b"), adapted(tmp_path / "b", row=True)) == (first, in_row)
    write(tmp_path / "a" / "README.md", b"notes")
    assert adapted(tmp_path / "a") == first
    write(tmp_path / "a" / "adapter_model.safetensors", b"others!")
    assert adapted(tmp_path / "a") != first and adapted(tmp_path / "a", row=True) != in_row

    def modelled(**kwargs: Any) -> bytes:
        return key(EngineConfig(kind="llamacpp", model=str(tmp_path / "m"), kwargs=kwargs))

    write(tmp_path / "m" / "x.gguf", b"x")
    chosen, all_files = modelled(filename="x.gguf"), modelled()
    write(tmp_path / "m" / "y.gguf", b"y")
    assert modelled(filename="x.gguf") == chosen and modelled() != all_files
    write(tmp_path / "m" / "x.gguf", b"z")
    assert modelled(filename="x.gguf") != chosen


def test_a_large_file_is_sampled_and_its_start_its_end_and_its_size_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_digest, "WHOLE_BYTES", 1 << 16)
    monkeypatch.setattr(file_digest, "SAMPLE_BYTES", 1 << 8)

    def of(content: bytes) -> str:
        path = write(tmp_path / f"{len(list(tmp_path.iterdir()))}.bin", content)
        found = file_digest.file_digest(path)
        assert found is not None
        return found.sha256

    plain = bytes(1 << 17)
    others = [b"\1" + plain[1:], plain[:-1] + b"\1", plain + b"\0"]
    assert len({of(content) for content in (plain, *others)}) == 4
    assert of(plain) == of(plain)


def test_an_unchanged_file_is_read_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", b"one", at=100)
    before = file_digest.file_digest(path)
    path.write_bytes(b"two")
    os.utime(path, (100, 100))  # as if nothing had changed
    assert file_digest.file_digest(path) == before
    os.utime(path, (101, 101))
    assert file_digest.file_digest(path) != before


REASONING = ("openai", {"model": "gpt-5-nano", "unsupported": "drop"})


@pytest.mark.parametrize(
    ("engine", "generation", "expected"),
    [
        (("llamacpp", {}), {}, False),
        (("llamacpp", {}), {"temperature": 0.0}, False),
        (("llamacpp", {}), {"temperature": 0.7}, True),
        (("llamacpp", {}), {"temperature": 0.7, "seed": 0}, False),
        (("vllm", {"extra_body": {"temperature": 1.0}}), {}, True),
        (("openai", {"model": "gpt-4o"}), {}, True),
        (("openai", {"model": "gpt-4o"}), {"n": 4}, True),
        (("openai", {"model": "gpt-4o"}), {"temperature": 0.0}, False),
        (("openai", {"model": "gpt-4o"}), {"seed": 1}, False),
        (("openai", {"model": "gpt-4o", "extra_body": {"temperature": 0}}), {}, False),
        (REASONING, {"temperature": 0.0}, True),
        (("openai", {"model": "gpt-6-sol", "unsupported": "drop"}), {"temperature": 0.0}, True),
        (("openai", {"model": "gpt-6-sol"}), {"temperature": 0.0, "reasoning_effort": "none"}, False),
        (("remote_vllm", {"model": "m", "base_url": "http://x"}), {}, True),
        (("anthropic", {"model": "claude-opus-4-7", "unsupported": "drop"}), {"temperature": 0.0, "seed": 1}, True),
        (("deepseek", {"model": "deepseek-reasoner"}), {"temperature": 0.0}, True),
    ],
)
def test_rows_are_numbered_where_equal_requests_may_get_different_answers(
    engine: tuple[str, dict[str, Any]], generation: dict[str, Any], expected: bool
) -> None:
    hasher = RequestHasher(config_from_keys(*engine), GenerationParams.parse(generation))
    assert hasher.row_key(parsed(id="a"), "f:1").is_numbered is expected


def test_rows_that_are_named_by_their_place_need_no_number_and_a_rows_own_settings_count() -> None:
    hasher = RequestHasher(ENGINE, GenerationParams(temperature=1.0))
    assert not hasher.row_key(parsed(), "f:1").is_numbered
    assert hasher.row_key(parsed(id="a"), "f:1").is_numbered
    assert not hasher.row_key(parsed(id="a", generation={"seed": 1}), "f:1").is_numbered
    chosen = RequestHasher(config_from_keys(*REASONING), GenerationParams(temperature=0.0))
    assert not chosen.row_key(parsed(id="a", model="gpt-4o"), "f:1").is_numbered


def test_greedy_rows_share_a_key_wherever_they_stand_and_sampled_ones_do_not() -> None:
    assert key(place="a:1") == key(place="b:2")
    assert key(place="a:1", temperature=1) != key(place="b:2", temperature=1)
    assert key(place="a:1", temperature=1, seed=3) == key(place="b:2", temperature=1, seed=3)
    row = parsed(id="r1")
    assert key(row=row, place="a:1", temperature=1) == key(row=row, place="b:2", temperature=1)


def test_an_override_equal_to_the_runs_own_parameter_is_the_same_request() -> None:
    assert key(row=parsed(generation={"max_tokens": 5})) == key(max_tokens=5)


def test_a_wrong_override_is_that_rows_error() -> None:
    with pytest.raises(EngineError, match="did you mean 'temperature'"):
        key(row=parsed(generation={"temprature": 1}))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(
        alphabet=st.characters(exclude_categories=["Cs"])
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(
        alphabet=st.characters(exclude_categories=["Cs"]), max_size=3), inner, max_size=3),
    max_leaves=10,
)  # fmt: skip


@given(json_values, json_values)
def test_keys_are_equal_exactly_when_the_messages_are(a: Any, b: Any) -> None:
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert (key(row=parsed(a)) == key(row=parsed(b))) == same


def test_a_keyer_travels_to_other_processes() -> None:
    hasher = RequestHasher(ENGINE, GenerationParams(temperature=1.0))
    assert pickle.loads(pickle.dumps(hasher)).key(parsed(), "x") == hasher.key(parsed(), "x")
