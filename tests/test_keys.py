"""Keys change exactly when the request does."""

from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.config import EngineConfig
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
        {"engine": dataclasses.replace(ENGINE, base_url="http://x")},
        {"engine": dataclasses.replace(ENGINE, extra_body={"a": 1})},
        {"engine": dataclasses.replace(ENGINE, kwargs={"chat_template": "t"})},
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
    ],
)
def test_what_only_changes_the_speed_does_not(change: dict[str, Any]) -> None:
    assert key(dataclasses.replace(ENGINE, **change)) == key()


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
