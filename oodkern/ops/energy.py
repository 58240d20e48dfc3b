"""Room `energy`: reductions of given logits.

With p = softmax(z / T), u = sum_k t_k p_k and an upstream gradient g, for a cotangent t of the gradient:

    E = -T logsumexp(z / T)     dE/dz   = -g p
                                d(-g p) . t = (dg: -u,  dz: -g p (t - u) / T)
    J = sum_k softplus(z_k)     dJ/dz   = g sigmoid(z)
                                d(g sigmoid(z)) . t = (dg: sum_k t_k sigmoid(z_k),  dz: g sigmoid (1 - sigmoid) t)

The gradient of E needs E alone beside the logits, since p = exp((z + E) / T).
"""

from __future__ import annotations

from torch import Tensor

from oodkern import _native, reference
from oodkern.backends import backend_for
from oodkern.ops._autograd import RowScore, apply, register_row_score_fakes
from oodkern.ops._checks import check_logits, check_temperature, score_dtype


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Energy of each row of logits, E = -T log sum_k exp(z_k / T). Low for in-distribution inputs.

    Args:
        logits: [..., K], float64, float32, bfloat16 or float16; any strides (logits are read in place
            where their rows are dense and evenly spaced, and copied first elsewhere).
        temperature: T > 0, in units of the logits.

    Returns:
        [...], in units of the logits; float32 (float64 for float64 logits), also under autocast. As an OOD
        score: larger = more OOD. A row of all -inf has E = +inf and gradient zero; NaN stays in its row.

    Differentiable twice, in `logits`; gradients have the dtype of the logits. Raises TypeError or ValueError
    for an argument of the wrong kind or shape.

    Source: Liu et al., Energy-based Out-of-distribution Detection, NeurIPS 2020.
    """
    check_logits(logits)
    temperature = check_temperature(temperature)
    if backend_for("energy", logits) == "reference":
        return reference.energy(logits, temperature)
    return apply(RowScore, "energy", True, logits, temperature)


def joint_energy(logits: Tensor) -> Tensor:
    """JointEnergy of each row of logits, J = sum_k log(1 + exp(z_k)). **High** for in-distribution inputs.

    Args:
        logits: [..., K], one logit per label; dtypes and strides as in `energy`.

    Returns:
        [...], non-negative, in nats; float32 (float64 for float64 logits), also under autocast. -J is the OOD
        score. Exact where log(1 + exp(z)) as written overflows (z > 88 in float32, 11 in float16) or rounds
        to zero (z < -17); under the smallest normal number (z < -87, float32) it is 0.

    Differentiable twice, in `logits`; gradients have the dtype of the logits. Raises TypeError or ValueError
    for an argument of the wrong kind or shape.

    Source: Wang et al., Can multi-label classification networks know what they don't know?, NeurIPS 2021.
    """
    check_logits(logits)
    if backend_for("energy", logits) == "reference":
        return reference.joint_energy(logits)
    return apply(RowScore, "joint_energy", False, logits, None)


if not _native.missing["cpu"]:
    register_row_score_fakes("energy", score_dtype)
    register_row_score_fakes("joint_energy", score_dtype)
