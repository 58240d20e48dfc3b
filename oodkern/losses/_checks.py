"""Checks of what losses are given: each names the argument, what came and what was expected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oodkern.ops._checks import INTEGERS, check_logits, check_tensor
from oodkern.ops._product import check_beside, check_head
from oodkern.processes import is_sharded

# Labels that are looked at together: a mask of them takes so many bytes.
LABELS = 1 << 22


def check_logit_rows(logits: Tensor, logits_ood: Tensor | None) -> None:
    for tensor, name in ((logits, "logits"), (logits_ood, "logits_ood")):
        if tensor is not None:
            check_logits(tensor, name)
            if tensor.dim() != 2:
                raise ValueError(f"{name}: expected [N, K], got {list(tensor.shape)}")
    if logits_ood is not None:
        if logits_ood.shape[1] != logits.shape[1]:
            raise ValueError(
                f"logits_ood: expected {logits.shape[1]} classes as logits have, got {logits_ood.shape[1]}"
            )
        check_beside(logits_ood, "logits_ood", logits, "logits", dtype=False)


def check_plain(value: Any, name: str) -> None:
    if is_sharded(value):
        raise TypeError(f"{name}: expected a plain tensor, the same on every process, got a DTensor")


def own_classes(weight: Any) -> slice:
    """Which rows of a DTensor with placement Shard(0) are here. As of torch.chunk the last may be few, or none."""
    K, mesh = len(weight), weight.device_mesh
    size = -(-K // mesh.size())
    start = min(mesh.get_local_rank() * size, K)
    return slice(start, min(start + size, K))


def check_shards(weight: Any, bias: Any) -> None:
    """A head of DTensors: chunks of the classes, in the order of the processes of a mesh of one dimension."""
    from torch.distributed.tensor import Shard

    mesh = weight.device_mesh
    for value, name in ((weight, "head_weight"), (bias, "head_bias")):
        if value is None:
            continue
        if not is_sharded(value) or value.device_mesh != mesh:
            of = f"of {value.device_mesh}" if is_sharded(value) else "plain"
            raise ValueError(f"{name}: expected a DTensor of {mesh}, as head_weight is, got a tensor {of}")
        if mesh.ndim != 1 or tuple(value.placements) != (Shard(0),):
            raise ValueError(
                f"{name}: expected the placement Shard(0) on a mesh of one dimension, got {tuple(value.placements)} on "
                f"{mesh}"
            )
    if mesh.get_coordinate() is None:
        raise ValueError(f"head_weight: expected a mesh with this process in it, got {mesh}")
    own = own_classes(weight)
    for value, name in ((weight, "head_weight"), (bias, "head_bias")):
        if value is not None and (found := len(value.to_local())) != own.stop - own.start:
            raise ValueError(
                f"{name}: expected {own.stop - own.start} of {len(weight)} classes on process {mesh.get_local_rank()} "
                f"of {mesh.size()}, as distribute_tensor makes the chunks, got {found}"
            )


def check_fused(features: Any, weight: Any, bias: Any, n_id: Any) -> None:
    """features [N, D] and a head of [K, D] and [K] or None; under autocast dtypes may differ, since it casts them."""
    check_plain(features, "features")
    if is_sharded(weight):
        check_shards(weight, bias)
    else:
        check_plain(bias, "head_bias")
    check_head(features, weight, bias, "head_")
    if n_id is not None:
        if isinstance(n_id, bool) or not isinstance(n_id, int | torch.SymInt):
            raise TypeError(f"n_id: expected an integer or None, got {type(n_id).__name__}")
        if not 0 <= n_id <= len(features):
            raise ValueError(f"n_id: expected 0..{len(features)}, the number of rows of features, got {n_id}")


def check_target(
    target: Any, is_ood: Any, shape: tuple[int, int], multi_label: bool, split: bool, like: Tensor, of: str
) -> None:
    """Of `shape` = N rows and K classes; `like` is the argument `of`, on whose device all have to be."""
    check_tensor(target, "target")
    if not is_sharded(like):
        check_plain(target, "target")
        check_plain(is_ood, "is_ood")
    N, K = shape
    expected = (N, K) if multi_label else (N,)
    if tuple(target.shape) != expected:
        hint = "" if multi_label or target.dim() != 2 else " (multi-label targets need multi_label=True)"
        raise ValueError(f"target: expected {list(expected)}, got {list(target.shape)}{hint}")
    if is_ood is not None:
        check_tensor(is_ood, "is_ood")
        if split or not multi_label:
            raise ValueError("is_ood: goes with the mixed style of multi-label losses; use target < 0 otherwise")
        if is_ood.dtype != torch.bool or tuple(is_ood.shape) != (N,):
            raise ValueError(f"is_ood: expected bool [{N}], got {is_ood.dtype} {list(is_ood.shape)}")
        check_beside(is_ood, "is_ood", like, of, dtype=False)
    check_beside(target, "target", like, of, dtype=False)
    if not multi_label and target.dtype not in INTEGERS:
        raise TypeError(f"target: expected integers, got {target.dtype}")
    # Reading the targets would make a GPU wait and torch.compile break its graph; there, gather's own check serves.
    if target.device.type == "cpu" and not torch.compiler.is_compiling() and target.numel():
        check_values(target, K, multi_label, marks=not split and is_ood is None)


def check_values(target: Tensor, K: int, multi_label: bool, marks: bool) -> None:
    """`marks`: negative targets mark outliers, in multi-label tasks a row of them."""
    low, high = target.min().item(), target.max().item()
    if not multi_label:
        if high >= K or (low < 0 and not marks):
            raise ValueError(f"target: expected classes in 0..{K - 1}, got {high if high >= K else low}")
        return
    if low >= 0 and high <= 1 and not target.is_floating_point():
        return
    for rows in target.split(max(LABELS // max(K, 1), 1)):
        fine = ((rows == 0) | (rows == 1)).all(-1)
        if marks:
            fine |= (rows < 0).all(-1)
        if not fine.all():
            rule = "0 or 1, or a whole row of -1 for an outlier" if marks else "0 or 1"
            raise ValueError(f"target: expected {rule}, got values from {low} to {high}")


def outlier_rows(target: Tensor, is_ood: Tensor | None, multi_label: bool) -> Tensor:
    """Which rows of a mixed batch are outliers, [N] bool; its arguments are checked."""
    if is_ood is not None:
        return is_ood
    if not multi_label:
        return target < 0
    # The largest of a row, not a mask of all: no [N, K] is formed.
    return target.amax(-1) < 0 if target.shape[-1] else target.new_ones(len(target), dtype=torch.bool)


def check_counts(counts: Any, separable: bool) -> None:
    """The numbers of rows of a whole batch, of which others are a part."""
    if counts is None:
        return
    if (
        not isinstance(counts, tuple)
        or len(counts) != 2
        or not all(isinstance(one, int) and one >= 0 for one in counts)
    ):
        raise ValueError(f"counts: expected two numbers of rows, in-distribution and outliers, got {counts!r}")
    if not separable:
        raise ValueError("counts: expected for losses that are sums over rows alone, and terms of this one couple them")
