"""Small scorers of pairs with random weights, made on the spot: with a head of their own, of modules, and causal ones."""

import json
from pathlib import Path

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from tests.tiny_models import HIDDEN, SHAPE, tiny_tokenizer

BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CHAT_SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
PAIR_CHAT = (
    "<|im_start|>system\nJudge.{% for message in messages if message.role == 'system' %}{{ ' ' + message.content }}"
    "{% endfor %}<|im_end|>\n<|im_start|>user\n<Query>: "
    "{{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}\n<Document>: "
    "{{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}"
    "<|im_end|>\n<|im_start|>assistant{{ '\\n' }}"
)
PLAIN_CHAT = (
    "{% for message in messages if message.role in ('system', 'user', 'assistant') %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
)


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts pairs together as BERT does, with token types."""
    tokenizer = tiny_tokenizer("[CLS] $A [SEP]", BERT_SPECIAL, pad="[PAD]", pair="[CLS] $A [SEP] $B:1 [SEP]:1")
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def write_classifier(directory: Path, labels: int = 1, *, activation: str | None = None, seed: int = 1, **more) -> Path:
    """Write a BERT with a sequence-classification head; *activation* is the configuration's, *more* its other values."""
    tokenizer = bert_tokenizer()
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=0, num_labels=labels, **SHAPE, **more)
    if activation is not None:
        config.sentence_transformers = {"activation_fn": activation}
    return _save(directory, BertForSequenceClassification(config), tokenizer)


def write_roberta(directory: Path) -> Path:
    """Write a RoBERTa with one label: no token types, two tokens between the texts, positions from the padding's on."""
    tokenizer = tiny_tokenizer(
        "<s> $A </s>", ["<s>", "<pad>", "</s>", "<unk>"], pad="<pad>", pair="<s> $A </s> </s> $B </s>"
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    torch.manual_seed(4)
    config = RobertaConfig(vocab_size=len(tokenizer), pad_token_id=1, num_labels=1, type_vocab_size=1, **SHAPE)
    return _save(directory, RobertaForSequenceClassification(config), tokenizer)


def write_xlnet(directory: Path) -> Path:
    """Write an XLNet with one label, which reads a pair from the last place of the batch: padding has to be on the left."""
    tokenizer = tiny_tokenizer(
        "$A <sep> <cls>:2", ["<cls>", "<sep>", "<pad>"], pad="<pad>", pair="$A <sep> $B:1 <sep>:1 <cls>:2"
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    torch.manual_seed(7)
    config = XLNetConfig(
        vocab_size=len(tokenizer),
        d_model=HIDDEN,
        n_layer=2,
        n_head=4,
        d_inner=64,
        num_labels=1,
        pad_token_id=2,
        initializer_range=0.2,
    )
    return _save(directory, XLNetForSequenceClassification(config), tokenizer)


def write_modular(directory: Path, *, labels: int = 1, prompt: str = "", head: bool = True) -> Path:
    """Write a CrossEncoder of the modules Transformer, Pooling (mean) and, with *head*, Dense."""
    plain = directory.with_name(f"{directory.name}-plain")
    tokenizer = bert_tokenizer()
    torch.manual_seed(5)
    _save(plain, BertModel(BertConfig(vocab_size=len(tokenizer), pad_token_id=0, **SHAPE)), tokenizer)
    transformer = Transformer(str(plain), processor_kwargs={"model_max_length": 64})
    dense = Dense(
        HIDDEN,
        labels,
        activation_function=torch.nn.Identity(),
        module_input_name="sentence_embedding",
        module_output_name="scores",
    )
    modules = [transformer, Pooling(HIDDEN, "mean"), *([dense] if head else [])]
    model = CrossEncoder(
        modules=modules,
        device="cpu",
        prompts={"search": prompt} if prompt else None,
        default_prompt_name="search" if prompt else None,
        activation_fn=torch.nn.Sigmoid(),
    )
    model.save_pretrained(str(directory))
    return directory


def write_causal(directory: Path, *, chat: str | None = PAIR_CHAT, tied: bool = False, instruction: str = "") -> Path:
    """Write a Qwen3 with a language model's head; with *instruction* as sentence-transformers saves it, that its prompt."""
    tokenizer = tiny_tokenizer("$A", CHAT_SPECIAL, pad="<|pad|>", pair="$A $B", words=["yes", "no"])
    tokenizer.chat_template = chat
    torch.manual_seed(6)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        tie_word_embeddings=tied,
        **SHAPE | {"max_position_embeddings": 512},
    )
    plain = directory.with_name(f"{directory.name}-plain") if instruction else directory
    tokenizer.model_max_length = 512
    _save(plain, Qwen3ForCausalLM(config), tokenizer)
    if instruction:
        model = CrossEncoder(str(plain), device="cpu", prompts={"task": instruction}, default_prompt_name="task")
        model.save_pretrained(str(directory))
    return directory


def library_scores(directory: Path, pairs: list[tuple[str, str]], **more) -> list:
    """Return what sentence-transformers predicts for *pairs*, each alone, at fp32."""
    model = CrossEncoder(str(directory), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32})
    return [model.predict([list(pair)], show_progress_bar=False, **more)[0].tolist() for pair in pairs]


def edit_json(file: Path, **values) -> None:
    """Change *values* of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _save(directory: Path, model, tokenizer: PreTrainedTokenizerFast) -> Path:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    edit_json(directory / "tokenizer_config.json", model_input_names=tokenizer.model_input_names)
    return directory
