"""What `oodkern plan` prints."""

from __future__ import annotations

from collections.abc import Callable

import torch

from oodkern.schema import TrainConfig
from oodkern.tables import aligned
from oodkern.training.meter import WORK
from oodkern.training.plan import CONFIGURED, WAYS, Cell, Plan

NAMES = {
    "parameters": "parameters and buffers",
    "kept": "starting model and what else is not trained",
    "gradients": "gradients",
    "optimizer": "state of the optimizer",
    WORK: "images, activations and work",
}
UNSEEN = (
    "Of one process, not compiled, with all terms on. What kernels allocate for themselves (workspaces of\n"
    "convolutions and products), a CUDA context and fragments are not seen: leave room for them."
)
OF_CPU = (
    "Without a CUDA device it is the CPU's step that is counted, with its kernels and its rules of autocast: leave\n"
    "about 10 % more."
)


def size_of(count: float) -> str:
    """Bytes in MiB, from 1 GiB on in GiB."""
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"


def plan_text(found: Plan) -> str:
    options = found.config.optimizer
    configured = found.configured.peak
    assert configured is not None
    parts = [
        f"Peak memory of a training step, predicted for {found.device}: {found.config.model.name}, "
        f"{found.config.precision}, {options.batch_size:,} ID images\nand, where a method takes any, "
        f"{options.outlier_batch_size:,} outliers",
        table(found, lambda cell: "-" if cell.peak is None else size_of(cell.peak.bytes)),
        f"At its peak {found.config.method}, as configured, holds\n"
        + "\n".join(f"{size_of(configured.kinds[kind]):>12}  {name}" for kind, name in NAMES.items()),
        measured_line(found),
    ]
    if found.memory is not None:
        parts += [
            f"Largest optimizer.batch_size in {size_of(found.memory)}, with {options.outlier_batch_size:,} outliers to "
            f"{options.batch_size:,} ID images, and its peak{reached(found)}",
            table(found, proposed),
        ]
    if notes := [*reasons(found), *limits(found), *of_several_processes(found.config)]:
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join([*parts, UNSEEN if found.device.startswith("cuda") else f"{UNSEEN}\n{OF_CPU}"])


def table(found: Plan, shown: Callable[[Cell], str]) -> str:
    rows = [(name, *(shown(by_way[way]) for way in WAYS)) for name, by_way in found.cells.items()]
    return aligned(("method", *WAYS), rows, words=(0,))


def proposed(cell: Cell) -> str:
    if cell.peak is None:
        return "-"
    if cell.proposal is None:
        return "none fits"
    one = cell.proposal
    mark = "*" if one.all_images else "**" if one.limit else ""
    return f"{one.batch_size:,}{mark} ({size_of(one.bytes)})"


def reached(found: Plan) -> str:
    proposals = [cell.proposal for by_way in found.cells.values() for cell in by_way.values()]
    marks = ["*: all training images"] * any(one and one.all_images for one in proposals)
    marks += ["**: limited as said below"] * any(one and one.limit for one in proposals)
    return f" ({'; '.join(marks)})" if marks else ""


def limits(found: Plan) -> list[str]:
    """What else than memory and the number of images ends the search for larger batches, each once."""
    proposals = [(name, cell.proposal) for name, by_way in found.cells.items() for cell in by_way.values()]
    said = [
        f"**: more than {one.batch_size:,} ID images cannot be trained with {name}: {one.limit}"
        for name, one in proposals
        if one and one.limit
    ]
    return list(dict.fromkeys(said))


def of_several_processes(config: TrainConfig) -> list[str]:
    """Which keys are without effect here."""
    keys = ["parallel=fully_shard"] * (config.parallel == "fully_shard")
    keys += ["parallel_head=true"] * config.parallel_head + ["batch_norm=sync"] * (config.batch_norm == "sync")
    if not keys:
        return []
    return [f"{', '.join(keys)}: this is the step of one process with the whole batch, in which that changes nothing"]


def reasons(found: Plan) -> list[str]:
    """Why some ways are not there, each once."""
    cells = [cell for by_way in found.cells.values() for cell in by_way.values()]
    return list(dict.fromkeys(cell.reason for cell in cells if cell.reason))


def measured_line(found: Plan) -> str:
    if not found.device.startswith("cuda"):
        return "Nothing was measured: that takes a CUDA device."
    name = torch.cuda.get_device_name(found.device)
    if found.measured is None:
        return f"Measured on {name}: {CONFIGURED} a step does not fit."
    one, predicted = found.measured, found.configured.peak
    assert predicted is not None
    return (
        f"Measured on {name}: {size_of(one.bytes)} {CONFIGURED}, {one.bytes / predicted.bytes:.2f} times the "
        f"prediction, and {one.milliseconds:,.1f} ms a step, the last\nof three on random images, without clipping and "
        "without the scaler of fp16."
    )
