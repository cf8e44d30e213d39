"""The checkpoints of `head_checkpoints` as GGUF files in float32, written once per machine with the package `gguf`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.checkpoint import gguf_path, made_once
from tests.support.head_checkpoints import LABELS, bert_dir, bert_vocabulary, causal_dir

_VERSION = 2
_LLAMA_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_BERT_LAYER = {
    "attention.self.query": "attn_q", "attention.self.key": "attn_k", "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output", "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up", "output.dense": "ffn_down", "output.LayerNorm": "layer_output_norm",
}  # fmt: skip
_BERT = {
    "embeddings.word_embeddings": "token_embd", "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types", "embeddings.LayerNorm": "token_embd_norm",
    "pooler.dense": "cls", "classifier": "cls.output",
}  # fmt: skip


def causal_gguf(pooling: int | None = None) -> Path:
    """`causal_dir`; with the pooling type in its metadata: 1 mean, 3 last."""
    name = f"smollm2-causal-gguf-{pooling}-v{_VERSION}"
    return made_once(name, lambda path: _write_llama(path / "model.gguf", pooling)) / "model.gguf"


def bert_gguf(head: str = "encoder") -> Path:
    """`bert_dir(head)`: the encoder without a pooling type, the classifiers with the type rank."""
    name = f"tiny-bert-gguf-{head}-v{_VERSION}"
    return made_once(name, lambda path: _write_bert(path / "model.gguf", head)) / "model.gguf"


def _weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor.float().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


def _renamed(name: str, layer: dict[str, str], other: dict[str, str]) -> str:
    """The name of a weight in a GGUF file."""
    body, _, kind = name.rpartition(".")
    body = body.removeprefix("model.").removeprefix("bert.").removeprefix("encoder.")
    if not body.startswith(("layers.", "layer.")):
        return f"{other[body]}.{kind}"
    _, number, part = body.split(".", 2)
    return f"blk.{number}.{layer[part]}.{kind}"


def _save(writer: Any, weights: dict[str, Any]) -> None:
    for name, array in weights.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_llama(path: Path, pooling: int | None) -> None:
    import gguf
    import transformers

    config = transformers.AutoConfig.from_pretrained(causal_dir())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if pooling is not None:
        writer.add_pooling_type(gguf.PoolingType(pooling))
    _copy_tokenizer(writer, gguf.GGUFReader(gguf_path()))
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for name, array in _weights(causal_dir()).items():
        new = _renamed(name, _LLAMA_LAYER, {"embed_tokens": "token_embd", "norm": "output_norm"})
        if count := heads.get(new.split(".")[-2]):  # llama.cpp rotates neighbours, transformers rotates halves
            half = array.shape[0] // count // 2
            array = array.reshape(count, 2, half, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        weights[new] = array
    _save(writer, weights)


def _copy_tokenizer(writer: Any, reader: Any) -> None:
    import gguf

    for name, found in reader.fields.items():
        if not name.startswith("tokenizer."):
            continue
        value = found.contents()
        add: Callable[[str, Any], None] = writer.add_array
        if not isinstance(value, list):
            kind = found.types[0]
            add = {
                gguf.GGUFValueType.STRING: writer.add_string,
                gguf.GGUFValueType.BOOL: writer.add_bool,
                gguf.GGUFValueType.UINT32: writer.add_uint32,
            }[kind]
        add(name, value)


def _write_bert(path: Path, head: str) -> None:
    import gguf
    import transformers

    folder = bert_dir(head)
    config = transformers.AutoConfig.from_pretrained(folder)
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    if head != "encoder":
        writer.add_pooling_type(gguf.PoolingType.RANK)
    if head == "labels":
        writer.add_classifier_output_labels(LABELS)
    words = bert_vocabulary()
    # llama.cpp marks the pieces that begin a word, BERT those that do not.
    pieces = [w if w.startswith("[") else w[2:] if w.startswith("##") else f"\u2581{w}" for w in words]
    writer.add_tokenizer_model("bert")
    writer.add_token_list(pieces)
    writer.add_token_types([3 if word.startswith("[") else 1 for word in words])
    writer.add_token_type_count(config.type_vocab_size)
    for kind, word in (("pad", "[PAD]"), ("unk", "[UNK]"), ("sep", "[SEP]"), ("mask", "[MASK]")):
        getattr(writer, f"add_{kind}_token_id")(words.index(word))
    writer.add_bos_token_id(words.index("[CLS]"))
    writer.add_eos_token_id(words.index("[SEP]"))
    weights = {_renamed(name, _BERT_LAYER, _BERT): array for name, array in _weights(folder).items()}
    if head == "encoder":
        weights = {name: array for name, array in weights.items() if not name.startswith("cls")}
    _save(writer, weights)
