"""The student: the embedding model's own transformer, mean pooling and one linear output, as a CrossEncoder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn

from services.common.encoders.batches import divided
from training.candidates import Floats

WORD_EMBEDDINGS = "embeddings.word_embeddings.weight"
_HEAD_DEVIATION = 0.02
# What a step's texts are divided into, by length, so that short ones are not padded to the longest.
_PARTS = 3
_ALIGNED_TOKENS = 8
_SCORING_TOKENS = 8192
_LONGEST_QUESTION_CHARS = 1200
_LONGEST_TEXT_CHARS = 4000


def new_student(embedding_model: Path, *, max_tokens: int, seed: int, device: str) -> CrossEncoder:
    """Return an untrained student whose transformer is that of *embedding_model*, on *device*."""
    torch.manual_seed(seed)
    transformer = Transformer(str(embedding_model), max_seq_length=max_tokens)
    dimensions = transformer.get_embedding_dimension()
    head = Dense(dimensions, 1, activation_function=nn.Identity(), module_output_name="scores")
    nn.init.normal_(head.linear.weight, std=_HEAD_DEVIATION)
    nn.init.zeros_(head.linear.bias)
    return _ready(CrossEncoder(modules=[transformer, Pooling(dimensions, "mean"), head], device=device))


def continued_student(directory: Path, *, max_tokens: int, device: str) -> CrossEncoder:
    """
    Return the student that an earlier training left whole in *directory*, to be trained further.

    Raises:
        UnknownStudent: The model there is of another kind.
    """
    student = CrossEncoder(str(directory), device=device, local_files_only=True)
    kinds = [type(module) for module in student.children()]
    words = any(name.endswith(WORD_EMBEDDINGS) for name, _ in student.named_parameters())
    if kinds != [Transformer, Pooling, Dense] or student.num_labels != 1 or not words:
        raise UnknownStudent(f"{directory} is not a transformer like BERT's, pooling and one linear output")
    student.max_seq_length = max_tokens
    return _ready(student)


class UnknownStudent(Exception):
    """A model that cannot be trained here; the message says why."""


def _ready(student: CrossEncoder) -> CrossEncoder:
    """Return *student* as it is trained: no dropout, the word embeddings fixed."""
    for module in student.modules():
        # The teacher's soft targets keep a student from learning by heart.
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if student.device.type == "cpu":
        # Plain products of matrices: with their backward pass a step takes two thirds of what it takes with fused attention.
        student[0].model.set_attn_implementation("eager")
    for name, parameter in student.named_parameters():
        if name.endswith(WORD_EMBEDDINGS) or ".pooler." in name:
            parameter.requires_grad_(False)
    return student


def trainable(student: CrossEncoder) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that training changes, by name, in the modules' order."""
    return [(name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad]


def logits(student: CrossEncoder, pairs: Sequence[tuple[str, str]], *, max_tokens: int) -> torch.Tensor:
    """
    Return the student's outputs for *pairs* in order, float32, computed in bf16 where autocast allows it.

    Tokenised as `CrossEncoder.predict` does it, in parts of similar length.
    """
    device = student.device
    tokenizer = student.tokenizer
    encoded = tokenizer(
        [question for question, _ in pairs],
        [text for _, text in pairs],
        truncation="longest_first",
        max_length=max_tokens,
    )
    parts = divided([len(ids) for ids in encoded["input_ids"]], min(_PARTS, len(pairs)))
    made = []
    with torch.autocast(device.type, torch.bfloat16):  # Around all parts: it keeps the weights that it has converted.
        for part in parts:
            chosen = {name: [values[at] for at in part] for name, values in encoded.items()}
            features = tokenizer.pad(chosen, pad_to_multiple_of=_ALIGNED_TOKENS, return_tensors="pt").to(device)
            made.append(student(dict(features))["scores"].squeeze(-1).float())
    order = np.argsort([at for part in parts for at in part])
    return torch.cat(made)[torch.from_numpy(order).to(device)]


def score(student: CrossEncoder, pairs: Sequence[tuple[str, str]], *, max_tokens: int) -> Floats:
    """Return the student's logits for any number of *pairs*, in order."""
    student.eval()
    cut = [(question[:_LONGEST_QUESTION_CHARS], text[:_LONGEST_TEXT_CHARS]) for question, text in pairs]
    order = sorted(range(len(cut)), key=lambda at: -len(cut[at][0]) - len(cut[at][1]))
    made: Floats = np.zeros(len(cut), np.float32)
    size = max(1, _SCORING_TOKENS // max_tokens)
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        with torch.inference_mode():
            made[batch] = logits(student, [cut[at] for at in batch], max_tokens=max_tokens).cpu().numpy()
    return made
