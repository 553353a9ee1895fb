"""Small models with random weights and a tokenizer of their own, made on the spot."""

from collections.abc import Sequence
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

HIDDEN = 32
POSITIONS = 128
SHAPE = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
}
_CORPUS = ["The quick brown fox jumps over the lazy dog again and again.", "A short question? Yes: 12,345.67 €"] * 4


def write_bert(directory: Path, pooling: str | None = "mean", seed: int = 1) -> Path:
    """Write a BERT with *pooling* as sentence-transformers saves one; None writes plain transformers files."""
    tokenizer = tiny_tokenizer("[CLS] $A [SEP]", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], pad="[PAD]")
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=0, **SHAPE)
    return _save(directory, BertModel(config), tokenizer, pooling)


def write_decoder(directory: Path, pooling: str = "lasttoken") -> Path:
    """Write a Qwen3, which sees only what is before a token, and reads a text from its last token."""
    tokenizer = tiny_tokenizer("$A <|end|>", ["<|pad|>", "<|end|>"], pad="<|pad|>")
    tokenizer.padding_side = "left"
    torch.manual_seed(2)
    config = Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=8, pad_token_id=0, **SHAPE)
    return _save(directory, Qwen3Model(config), tokenizer, pooling)


def tiny_tokenizer(
    template: str, special: list[str], *, pad: str, pair: str = "$A:0 $B:1", words: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Return a byte-pair tokenizer with few merges; *words* are tokens of it, *pair* is its template for two texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*_CORPUS, *[word for word in words for _ in range(100)]], trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, pair=pair, special_tokens=[(token, tokenizer.token_to_id(token)) for token in special]
    )
    named = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"} if "[CLS]" in special else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, model_max_length=POSITIONS, additional_special_tokens=[], **named
    )


def _save(directory: Path, model, tokenizer: PreTrainedTokenizerFast, pooling: str | None) -> Path:
    plain = directory if pooling is None else directory.with_name(f"{directory.name}-plain")
    model.save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    if pooling is not None:
        modules = [Transformer(str(plain), max_seq_length=64), Pooling(HIDDEN, pooling)]
        SentenceTransformer(modules=modules, device="cpu").save(str(directory))
    return directory
