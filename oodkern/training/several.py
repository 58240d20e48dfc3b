"""What is different where several passes or processes make a step, and what that takes of a configuration."""

from __future__ import annotations

import os

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from oodkern.classifier import Classifier
from oodkern.config import ConfigError
from oodkern.methods import METHODS, Method
from oodkern.processes import Processes
from oodkern.schema import TrainConfig


def own_device(config: TrainConfig, device: torch.device) -> torch.device:
    """Of this process among those of its machine."""
    if device.type == "cpu" or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.index is not None:
        raise ConfigError(f"device: of several processes each takes its own GPU; expected cuda, got {config.device}")
    index = int(os.environ.get("LOCAL_RANK", 0))
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"device: expected a GPU for each process of a machine, got {torch.cuda.device_count()} for process {index}"
        )
    return torch.device("cuda", index)


def check_several(config: TrainConfig, count: int, device: torch.device) -> None:
    """Raises ConfigError where a configuration does not go with so many processes."""
    least = count * config.accumulate
    sizes = {"optimizer.batch_size": config.optimizer.batch_size}
    if METHODS[config.method].uses_outliers:
        sizes["optimizer.outlier_batch_size"] = config.optimizer.outlier_batch_size
    for key, size in sizes.items():
        if size < least:
            raise ConfigError(
                f"{key}: expected {least} or more, one for each of {config.accumulate} pass(es) of {count} processes, "
                f"got {size}"
            )
    if config.batch_norm == "sync" and device.type == "cpu":
        raise ConfigError("batch_norm: sync is for GPUs; on CPUs take frozen, or a model without BatchNorm")


def synchronised(model: Classifier, config: TrainConfig, processes: Processes, device: torch.device) -> Classifier:
    """With batch_norm=sync, and several processes, the model with statistics of all of them."""
    if config.batch_norm != "sync" or processes.count == 1:
        return model
    return nn.SyncBatchNorm.convert_sync_batchnorm(model).to(device)


def what_differs(config: TrainConfig, method: Method, processes: Processes, model: nn.Module) -> list[str]:
    """What a person has to know of a step in parts, line by line."""
    lines = []
    count = processes.count
    if count > 1:
        lines.append(f"{count} processes: batch sizes are of all of them, and each reads its share")
    frozen = config.batch_norm == "frozen"
    by_batch = any(isinstance(module, _BatchNorm) for module in model.modules())
    by_batch = by_batch and not (frozen and config.pretrain.epochs == 0)
    where = "in pretraining, which batch_norm=frozen is not for, " if frozen else ""
    splits = config.split_forward and method.uses_outliers
    if splits and by_batch and not frozen:
        lines.append("split forward: BatchNorm normalises ID images and outliers by their own statistics, not jointly")
    if by_batch and config.accumulate > 1:
        lines.append(
            f"accumulate={config.accumulate}: {where}BatchNorm normalises each pass by its own statistics, so a step "
            "is not that of one pass over the whole batch"
            + ("" if frozen else "; batch_norm=frozen, or a model without BatchNorm, makes it so")
        )
    if by_batch and count > 1 and config.batch_norm != "sync":
        lines.append(
            f"{where}each process normalises its share by its own statistics, and running statistics are averaged "
            "over the processes" + ("" if frozen else "; batch_norm=sync takes those of all, batch_norm=frozen none")
        )
    coupled = method.coupled
    if count > 1 and coupled and not config.gather_negatives:
        lines.append(f"gather_negatives=false: {coupled} sees the rows of one process alone, and its mean counts")
    if coupled and config.accumulate * (2 if splits else 1) > 1:
        lines.append(f"several passes: {coupled} sees the rows of all of them, which are made twice")
    if config.parallel == "fully_shard" and count > 1:
        lines.append("fully_shard: each process keeps a share of parameters, gradients and optimizer state")
    if config.parallel_head and count > 1:
        lines.append("parallel head: each process has a share of the classes")
    return lines


def resumed_by_others(before: int, now: int) -> str:
    return (
        f"the run had {before} process(es) and goes on with {now}: images, their order and augmentation, schedule, "
        "model and optimizer are bit for bit those that it would have had; from here on sums are taken in another "
        "order, so steps are equal to rounding (but BatchNorm on batch statistics takes those of other shares, and "
        "with gather_negatives=false coupled terms see other rows), and new processes draw random numbers of their own"
    )
