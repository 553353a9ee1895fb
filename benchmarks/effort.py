"""How long and how often to measure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Effort:
    """Rounds per row, a factor on the seconds of each stretch, and the length of the mixed load."""

    rounds: int
    scale: float
    mixed_s: float

    def seconds(self, full: float, *, least: float = 1.0) -> float:
        """Return the length of a stretch that takes *full* seconds in a full run, and never under *least*."""
        return max(least, full * self.scale)


FULL = Effort(rounds=5, scale=1.0, mixed_s=600.0)
QUICK = Effort(rounds=2, scale=0.2, mixed_s=20.0)
