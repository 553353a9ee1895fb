"""What a step makes smaller: the distance to the teacher within each list, and a little of right or wrong at all."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from training.lists import TrainingList


def distillation_loss(logits: Tensor, lists: Sequence[TrainingList]) -> Tensor:
    """Return the mean over *lists* of KL(teacher ‖ student) over a list's texts; *logits* has them one after another."""
    losses = [
        functional.kl_div(mine.log_softmax(0), _to(mine, one.targets).log_softmax(0), reduction="sum", log_target=True)
        for mine, one in zip(logits.split(_sizes(lists)), lists, strict=True)
    ]
    return torch.stack(losses).mean()


def absolute_loss(logits: Tensor, lists: Sequence[TrainingList]) -> Tensor:
    """
    Return the cross-entropy of the sigmoid of *logits* where it is known whether a text answers.

    Lists alone leave open what a logit of zero means, and logits of two questions could not be compared.
    """
    known = torch.cat([_to(logits, one.known) for one in lists])
    told = ~known.isnan()
    if not bool(told.any()):
        return logits.sum() * 0.0
    return functional.binary_cross_entropy_with_logits(logits[told], known[told])


def agreement(logits: Tensor, lists: Sequence[TrainingList]) -> float:
    """Return the share of *lists* whose answer, the first text, has the highest logit."""
    best = [float(int(mine.argmax()) == 0) for mine in logits.split(_sizes(lists))]
    return sum(best) / max(1, len(best))


def _sizes(lists: Sequence[TrainingList]) -> list[int]:
    return [len(one.texts) for one in lists]


def _to(like: Tensor, values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32, device=like.device)
