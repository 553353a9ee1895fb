"""What this machine computes natively, and how much of it the process may use."""

import hashlib
import math
import os
import platform
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from services.common.model_errors import InvalidModel

_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_FP16_FLAGS = frozenset({"avx512_fp16", "amx_fp16"})
# The device files of NVIDIA's and AMD's drivers, and of Windows' for Linux guests.
_GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")


class Processor(NamedTuple):
    """A CPU by its name and the instruction sets it has."""

    name: str
    flags: frozenset[str]

    @property
    def has_bf16(self) -> bool:
        """Whether it multiplies bf16 matrices itself; emulated ones are slower than fp32."""
        return bool(self.flags & _BF16_FLAGS)

    @property
    def has_fp16(self) -> bool:
        """Whether it multiplies fp16 matrices itself."""
        return bool(self.flags & _FP16_FLAGS) or (
            platform.machine() in ("arm64", "aarch64") and "asimdhp" in self.flags
        )

    @property
    def key(self) -> str:
        """A name that changes with anything that may change which runtime is fastest."""
        flags = hashlib.sha256(" ".join(sorted(self.flags)).encode()).hexdigest()[:12]
        return f"{platform.machine()} {self.name} {flags}"


@cache
def processor() -> Processor:
    """Return this machine's CPU; one without /proc/cpuinfo has no known flags."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return Processor(platform.processor(), frozenset())
    fields = dict(line.split(":", 1) for line in text.split("\n\n", 1)[0].splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    flags = named.get("flags") or named.get("Features") or ""
    return Processor(named.get("model name") or named.get("CPU part") or "unknown", frozenset(flags.split()))


def usable_cores() -> int:
    """Return how many cores this process may use: its affinity and its cgroup's CPU limit counted, 1 at least."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CGROUP_LIMIT.read_text().split()
        if quota != "max":
            cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass
    return max(1, cores)


def resolve_device(device: str) -> str:
    """
    Return the device that *device* names: for `auto` CUDA (or ROCm) where there is one, then MPS, then the CPU.

    torch, which takes seconds to import, is asked only where there may be a device beside the CPU.

    Raises:
        InvalidModel: The device asked for is not there.
    """
    if device == "cpu" or (device == "auto" and not _may_have_gpu()):
        return "cpu"
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, found in there.items() if found)
    if not there[device]:
        raise InvalidModel(f"device {device} was asked for, and torch finds none")
    return device


def _may_have_gpu() -> bool:
    if sys.platform == "darwin":
        return True
    try:
        cpu_only = version("torch").endswith("+cpu")
    except PackageNotFoundError:
        cpu_only = True
    return not cpu_only and any(os.path.exists(file) for file in _GPU_FILES)
