"""Small checkpoints for tasks other than chats, made once per machine from the first layers of SmolLM2-135M.

A sequence classifier whose head is trained on a few sentences, a reward model, embeddings in the layout of
sentence-transformers; and small BERTs with random weights, as cross-encoders and as an encoder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.checkpoint import checkpoint_dir, made_once

_VERSION = 2
LAYERS = 3
LABELS = ("question", "order", "remark")
SENTENCES = {
    "question": ["Where is the station?", "What time is it now?", "Who wrote this book?", "How much does bread cost?"],
    "order": ["Close the door at once.", "Give me the red apple.", "Write your name here.", "Bring two cups of tea."],
    "remark": ["The sky is grey today.", "My brother likes football.", "This soup tastes good.", "They moved to Rome."],
}
PAGES = {
    "good": [
        "Rice grows in warm, wet fields.",
        "The museum opens at ten and closes at six.",
        "Salt melts ice on roads.",
        "A whale breathes air, so it must come up from time to time.",
    ],
    "poor": [
        "Home | News | Log in | Next >> | (c) 2011",
        "qwe 88x zzk,,, 0f3 ;; plm",
        "a9F== %%3C 0xFE //cdn/b.js?v=3",
        "Share Tweet Pin | Cart (0) | DE FR",
    ],
}
_TEXT = "the a cat dog sat on mat ran in park is what where who red blue big small house tree and of to it likes"
WORDS = _TEXT.split()


def causal_dir() -> Path:
    """The language model with the first layers only."""
    return made_once(f"smollm2-causal-v{_VERSION}", _write_causal)


def classifier_dir() -> Path:
    """A classifier with three labels over SmolLM2, without a padding token in its config."""
    return made_once(f"smollm2-classifier-v{_VERSION}", lambda path: _write_classifier(path, SENTENCES))


def quality_dir() -> Path:
    """A classifier of texts: good or poor."""
    return made_once(f"smollm2-quality-v{_VERSION}", lambda path: _write_classifier(path, PAGES, steps=600))


def reward_dir() -> Path:
    """A reward model: one output, higher for orders than for questions."""
    return made_once(f"smollm2-reward-v{_VERSION}", lambda path: _write_classifier(path, SENTENCES, ["reward"]))


def embedder_dir() -> Path:
    """Embeddings of SmolLM2: mean and last token, a dense layer, normalisation, a prompt, texts cut at 64 tokens."""
    return made_once(f"smollm2-embedder-v{_VERSION}", _write_embedder)


def mean_embedder_dir() -> Path:
    """Embeddings of SmolLM2 as all engines can pool them: the mean of the token vectors, normalised."""
    return made_once(f"smollm2-mean-embedder-v{_VERSION}", _write_mean_embedder)


def pair_dir() -> Path:
    """A cross-encoder: a random BERT over whole words, with a chat template, by which it is also a reward model."""
    return made_once(f"tiny-pair-v{_VERSION}", _write_pair)


def bert_dir(head: str = "encoder") -> Path:
    """A BERT with two layers and random weights: head is `encoder`, `cross` (a cross-encoder) or `labels`."""
    return made_once(f"tiny-bert-{head}-v{_VERSION}", lambda path: _write_bert(path, head))


def _first_layers(kind: Any, prefix: str, **further: Any) -> Any:
    """A model of the class `kind` with the first layers of SmolLM2. Other weights are made from a seed."""
    import torch
    import transformers
    from safetensors import safe_open

    config = transformers.AutoConfig.from_pretrained(checkpoint_dir(), num_hidden_layers=LAYERS, **further)
    with torch.device("meta"):
        model = kind(config)
    wanted = model.state_dict()
    with safe_open(checkpoint_dir() / "model.safetensors", "pt") as stored:
        found = {prefix + name[len("model.") :]: name for name in stored.keys()}  # noqa: SIM118
        weights = {name: stored.get_tensor(found[name]) for name in wanted if name in found}
    generator = torch.Generator().manual_seed(0)
    for name, like in wanted.items():
        if name not in weights:
            weights[name] = torch.randn(like.shape, generator=generator).mul(0.02).bfloat16()
    model.load_state_dict(weights, assign=True)
    base = model.model if prefix else model
    base.rotary_emb = type(base.rotary_emb)(config)  # its numbers are not in the state
    return model


def _tokenizer() -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(checkpoint_dir())


def _write_causal(path: Path) -> None:
    import transformers

    model = _first_layers(transformers.LlamaForCausalLM, "model.")
    model.tie_weights()
    model.save_pretrained(path)
    _tokenizer().save_pretrained(path)


def _write_classifier(
    path: Path, sentences: dict[str, list[str]], outputs: list[str] | None = None, steps: int = 60
) -> None:
    """Trains a head on the sentences of each label. With one output, it learns the number of the label."""
    import torch
    import transformers

    labels = dict(enumerate(outputs or sentences))
    about = {"num_labels": len(labels), "id2label": labels, "pad_token_id": None}
    # In float32: with OMP_THREAD_LIMIT=1, which `make test` sets, bfloat16 gives wrong numbers on several threads.
    model = _first_layers(transformers.LlamaForSequenceClassification, "model.", **about).float()
    tokenizer = _tokenizer()
    texts = [(text, at) for at, label in enumerate(sentences) for text in sentences[label]]
    with torch.no_grad():
        states = [model.model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1] for text, _ in texts]
    features, wanted = torch.stack(states), torch.tensor([at for _, at in texts])
    head = model.score
    optimizer = torch.optim.Adam(head.parameters(), 0.003)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = head(features)
        single = len(labels) == 1
        loss = (logits[:, 0] - wanted).square().mean() if single else torch.nn.functional.cross_entropy(logits, wanted)
        loss.backward()
        optimizer.step()
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)


def _write_embedder(path: Path) -> None:
    import torch
    import transformers
    from safetensors.torch import save_file

    model = _first_layers(transformers.LlamaModel, "")
    model.save_pretrained(path)
    tokenizer = _tokenizer()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.save_pretrained(path)
    width = model.config.hidden_size
    generator = torch.Generator().manual_seed(1)
    names = ("Transformer", "Pooling", "Dense", "Normalize")
    modules = []
    for i, name in enumerate(names):
        folder = f"{i}_{name}" if i else ""
        (path / folder).mkdir(exist_ok=True)
        modules.append({"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{name}"})
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True}
    dense = {"in_features": 2 * width, "out_features": 96, "bias": True,
             "activation_function": "torch.nn.modules.activation.Tanh"}  # fmt: skip
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": {**pooling, "pooling_mode_cls_token": False, "include_prompt": True},
        "2_Dense/config.json": dense,
        "sentence_bert_config.json": {"max_seq_length": 64, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": None},
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    weights = torch.randn((96, 2 * width), generator=generator) / 30, torch.randn(96, generator=generator) / 10
    save_file({"linear.weight": weights[0], "linear.bias": weights[1]}, path / "2_Dense" / "model.safetensors")


def bert_vocabulary() -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyz?.,"
    pieces = [*letters, *(f"##{letter}" for letter in letters)]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys([*WORDS, *pieces])]


def _write_bert(path: Path, head: str) -> None:
    import torch
    import transformers

    (path / "vocab.txt").write_text("\n".join(bert_vocabulary()) + "\n")
    transformers.BertTokenizer.from_pretrained(path, model_max_length=128).save_pretrained(path)
    config = transformers.BertConfig(
        vocab_size=len(bert_vocabulary()), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=128, initializer_range=0.3,
        id2label=dict(enumerate(LABELS if head == "labels" else ("score",))),
    )  # fmt: skip
    torch.manual_seed(0)
    kind = transformers.BertModel if head == "encoder" else transformers.BertForSequenceClassification
    kind(config).save_pretrained(path)


def _write_mean_embedder(path: Path) -> None:
    import transformers

    model = _first_layers(transformers.LlamaModel, "")
    model.save_pretrained(path)
    _tokenizer().save_pretrained(path)
    folders = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [{"path": folder, "type": f"sentence_transformers.models.{name}"} for name, folder in folders.items()]
    (path / "1_Pooling").mkdir()
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": model.config.hidden_size, "pooling_mode_mean_tokens": True},
        "sentence_bert_config.json": {"max_seq_length": 512},
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))


# Any other word is [UNK].
_PAIR_TEXT = (
    "what is the capital of france paris berlin a city in germany river seine rain falls from clouds bread needs flour and "
    "water who wrote hamlet shakespeare user assistant system hello yes no blue sky . ? : ,"
)


def _write_pair(path: Path) -> None:
    import tokenizers
    import torch
    import transformers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: at for at, word in enumerate([*special, *_PAIR_TEXT.split()])}, "[UNK]")
    )
    words.normalizer = tokenizers.normalizers.BertNormalizer()
    words.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    words.add_special_tokens(special)
    words.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"], model_max_length=128,
        chat_template="{% for message in messages %}{{ message.role }} : {{ message.content }} [SEP] {% endfor %}",
    ).save_pretrained(path)  # fmt: skip
    config = transformers.BertConfig(
        vocab_size=words.get_vocab_size(), hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, max_position_embeddings=128, initializer_range=0.3, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(1)
    transformers.BertForSequenceClassification(config).save_pretrained(path)
