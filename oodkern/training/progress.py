"""What the progress bar shows."""

from __future__ import annotations

import resource

import torch

from oodkern.training.stage import Stage


def shown(parts: dict[str, float], stage: Stage) -> dict[str, str]:
    """The loss, its parts, images per second and peak memory, for the progress bar."""
    hidden = ("seconds", "gradient_norm")
    rate = stage.images_per_step / max(parts["seconds"], 1e-9)
    rest = {"images/s": f"{rate:,.0f}", "memory": f"{peak_memory(stage.device) / 2**30:.1f}GiB"}
    return {name: f"{value:.3g}" for name, value in parts.items() if name not in hidden} | rest


def peak_memory(device: torch.device) -> int:
    """Bytes: what PyTorch's allocator has held at most on a GPU, and the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
