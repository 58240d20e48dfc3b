"""What losses take as features, head and targets, and what they say of anything else."""

import pytest
import torch
from test_from_features import batch
from test_losses import CASES, K, M, N

from oodkern.losses import EnergyLoss


@pytest.mark.parametrize("loss", [case[0] for case in CASES.values()], ids=list(CASES))
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.float32])
def test_dtypes_of_targets(loss, dtype):
    tensors, target = batch(loss.multi_label)
    if not loss.multi_label and dtype in (torch.bool, torch.float32):
        with pytest.raises(TypeError, match="target: expected integers, got"):
            loss.from_features(*tensors, target.to(dtype), N)
        return
    expected = loss.from_features(*tensors, target, N)
    assert torch.equal(loss.from_features(*tensors, target.to(dtype), N), expected)


def test_rejects():
    (x, w, b), target = batch(False)
    loss = EnergyLoss()
    many = EnergyLoss(multi_label=True)
    labels = torch.zeros(N + M, K)
    for error, message, arguments in [
        (TypeError, r"features: expected a torch\.Tensor, got list", ([1.0], w, b, target, N)),
        (ValueError, r"features: expected \[N, D\], got \[5\]", (x[0], w, b, target, N)),
        (TypeError, "features: expected one of float64, .*, got int64", (x.long(), w, b, target, N)),
        (ValueError, r"head_weight: expected \[K, 5\] as features are, got \[7, 3\]", (x, w[:, :3], b, target, N)),
        (TypeError, "head_weight: expected float64 as features are, got float32", (x, w.float(), b, target, N)),
        (ValueError, "head_weight: expected on cpu, where features are, got meta", (x, w.to("meta"), b, target, N)),
        (
            ValueError,
            r"head_bias: expected \[7\], one number a row of head_weight, got \[6\]",
            (x, w, b[:6], target, N),
        ),
        (TypeError, "head_bias: expected float64 as features are", (x, w, b.float(), target, N)),
        (TypeError, "n_id: expected an integer or None, got float", (x, w, b, target, 9.0)),
        (TypeError, "n_id: expected an integer or None, got bool", (x, w, b, target, True)),
        (ValueError, r"n_id: expected 0\.\.23, the number of rows of features, got 24", (x, w, b, target, 24)),
        (ValueError, r"n_id: expected 0\.\.23", (x, w, b, target, -1)),
        (ValueError, r"target: expected \[8\], got \[9\]", (x, w, b, target, 8)),
        (ValueError, r"target: expected \[23\], got \[9\]", (x, w, b, target)),
        (ValueError, r"target: expected \[9\], got \[9, 7\] \(multi-label targets need", (x, w, b, labels[:N], N)),
        (ValueError, r"target: expected classes in 0\.\.6, got -1", (x, w, b, target.clone().fill_(-1), N)),
        (ValueError, r"target: expected classes in 0\.\.6, got 7", (x, w, b, target.clone().fill_(7), N)),
        (TypeError, "target: expected integers, got", (x, w, b, target.float(), N)),
        (TypeError, r"target: expected a torch\.Tensor, got list", (x, w, b, [1] * N, N)),
        (ValueError, "target: expected on cpu, where features are, got meta", (x, w, b, target.to("meta"), N)),
    ]:
        with pytest.raises(error, match=message):
            loss.from_features(*arguments)
    is_ood = torch.zeros(N + M, dtype=torch.bool)
    many.from_features(x, w, b, labels, is_ood=is_ood)
    with pytest.raises(ValueError, match="is_ood: goes with the mixed style of multi-label losses"):
        many.from_features(x, w, b, labels, N + M, is_ood=is_ood)
    with pytest.raises(ValueError, match="is_ood: goes with the mixed style of multi-label losses"):
        loss.from_features(x, w, b, torch.zeros(N + M, dtype=torch.int64), is_ood=is_ood)
    with pytest.raises(ValueError, match=r"is_ood: expected bool \[23\]"):
        many.from_features(x, w, b, labels, is_ood=is_ood[:3])
    with pytest.raises(ValueError, match="target: expected 0 or 1, got values from -1"):
        many.from_features(x, w, b, labels - 1, N + M)
    labels[N, 2] = -1
    with pytest.raises(ValueError, match="target: expected 0 or 1, or a whole row of -1 for an outlier"):
        many.from_features(x, w, b, labels)
