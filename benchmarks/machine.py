"""What a figure was measured on: processor, memory, versions, commit."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
PACKAGES = ("torch", "sentence-transformers", "transformers", "openvino", "tokenizers", "fastapi", "uvicorn", "redis")


def describe() -> list[str]:
    """Return lines about this machine and the software in this environment."""
    names, flags = _processor()
    lines = [
        f"processor: {names}, {os.cpu_count()} cores ({len(os.sched_getaffinity(0))} usable)",
        f"instruction sets: {' '.join(flag for flag in FLAGS if flag in flags) or 'none of ' + ' '.join(FLAGS)}",
        f"memory: {_memory_gib():.1f} GiB; {platform.system()} {platform.release()}; Python {platform.python_version()}",
        "versions: " + ", ".join(f"{name} {version}" for name in PACKAGES if (version := _version(name))),
    ]
    return [*lines, *_gpus()]


def commit() -> str:
    """Return the commit measured, with a note when files differ from it; `unknown` outside a checkout."""
    try:
        name = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name} with uncommitted changes" if changed else name


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _processor() -> tuple[str, set[str]]:
    name, flags = platform.processor() or platform.machine(), set[str]()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() == "flags":
            flags.update(value.split())
    return name, flags


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []
    return [f"GPU: {line.strip()}" for line in found]
