"""
A cross-encoder that every peer can serve: all-MiniLM-L6-v2's own encoder under a classification head made here.

Libraries older than ours know one form only, a head on the first token's state, and the shipped model is of another; what
a pair costs depends on the shape of the encoder, which is the same. The scores mean nothing, but they differ as a trained
model's do, so that a runtime which loses precision is found out: the head is the direction in which the states of real
pairs differ most, scaled to a deviation of 1.
"""

import json
import shutil
from itertools import islice
from pathlib import Path

from benchmarks.corpus import Questions
from benchmarks.servers import model_directory
from tercet.demo.corpus import demo_documents

PAIRS = 64

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def make(directory: Path) -> Path:
    """Write the model into *directory*, which must not exist, and return it; the same files on every machine of a kind."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    encoder = model_directory()
    directory.mkdir(parents=True)
    for name in _TOKENIZER:
        shutil.copyfile(encoder / name, directory / name)
    config = json.loads((encoder / "config.json").read_text())
    config |= {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    config |= {"label2id": {"LABEL_0": 0}}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    weights = {
        f"bert.{name}": values
        for name, values in load_file(encoder / "model.safetensors").items()
        if not name.endswith("position_ids")
    }

    def save(head: torch.Tensor, bias: torch.Tensor) -> None:
        named = {**weights, "classifier.weight": head.contiguous(), "classifier.bias": bias}
        save_file(named, directory / "model.safetensors", {"format": "pt"})

    save(torch.zeros(1, config["hidden_size"]), torch.zeros(1))
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    documents = [document["text"] for document in islice(demo_documents(), PAIRS)]
    pairs = tokenizer(
        Questions().take(PAIRS), documents, padding=True, truncation=True, max_length=128, return_tensors="pt"
    )
    with torch.inference_mode():
        states = model.bert(**pairs).pooler_output
    mean = states.mean(dim=0)
    direction = torch.linalg.svd(states - mean, full_matrices=False).Vh[0]
    deviation = ((states - mean) @ direction).std()
    head = direction / deviation
    save(head[None], -(head @ mean)[None])
    return directory
