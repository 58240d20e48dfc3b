"""All the mathematics in plain PyTorch: the documentation of every op, its oracle in tests, its fallback.

Every function here takes any floating dtype, computes in float32 at least, and is differentiable as often as
PyTorch can; nothing is fused and nothing is checked. Scores come out as float32 (float64 stays float64).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from oodkern._precision import autocasting as autocasting
from oodkern._precision import unrounded
from oodkern._precision import widen as widen


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """E = -T log sum_k exp(z_k / T) over the last dimension.

    Not torch.logsumexp, whose gradient is NaN for a row of all -inf (here: E = +inf, gradient zero) and whose
    forward-mode derivative edits a saved tensor.
    """
    z = widen(logits)
    if z.shape[-1] == 0:
        return z.sum(-1) + torch.inf
    maximum = z.detach().amax(-1, keepdim=True)
    pivot = torch.where(maximum.isfinite(), maximum, 0.0)
    total = ((z - pivot) / temperature).exp().sum(-1)
    nothing = total == 0
    log_total = torch.where(nothing, 1.0, total).log()
    return torch.where(nothing, torch.inf, -(pivot.squeeze(-1) + temperature * log_total))


def joint_energy(logits: Tensor) -> Tensor:
    """J = sum_k softplus(z_k) over the last dimension, softplus(z) = log(1 + exp(z)) = max(z, 0) + log1p(exp(-|z|)).

    Written with two branches rather than with |z|, whose derivative at 0 is 0 and would make the slope there 1
    instead of 1/2. Not torch's softplus, which is linear past 20, nor its logsigmoid, whose second derivative
    sigmoid (1 - sigmoid) cancels for very negative z.
    """
    z = widen(logits)
    positive = z > 0
    return (torch.where(positive, z, 0.0) + torch.where(positive, -z, z).exp().log1p()).sum(-1)


def oe_head(logits: Tensor) -> Tensor:
    """logsumexp(z) - mean_c z_c over the last dimension, both of them about the row's maximum."""
    z = widen(logits)
    if z.shape[-1] == 0:
        return z.sum(-1)
    maximum = z.detach().amax(-1, keepdim=True)
    below = z - torch.where(maximum.isfinite(), maximum, 0.0)
    low = energy(below)
    return torch.where(low == torch.inf, 0.0, -low) - below.mean(-1)


def energy_head(logits: Tensor, margin: float, side: str) -> Tensor:
    """relu(E - margin)^2 of side "in", relu(margin - E)^2 of side "out", with E = -logsumexp(z)."""
    over = energy(logits) - margin
    return (over if side == "in" else -over).relu().square()


def bce_head(logits: Tensor, target: Tensor) -> Tensor:
    """mean_c softplus(z_c) - y_c z_c over the last dimension.

    max(z, 0) - y z is |z| times 1 - y or y, so that labels of 0 and 1 leave nothing to cancel and an infinite logit
    on its label's side counts 0. Two branches rather than |z|: see `joint_energy`.
    """
    z, y = widen(logits), target.to(widen(logits).dtype)
    positive = z > 0
    magnitude, weight = torch.where(positive, z, -z), torch.where(positive, 1 - y, y)
    off = torch.where(weight == 0, 0.0, magnitude * weight)
    return (off + torch.where(positive, -z, z).exp().log1p()).sum(-1) / max(z.shape[-1], 1)


def sample_norm(x: Tensor) -> Tensor:
    """||x_i|| over all dimensions but the first.

    Not torch.linalg.vector_norm, whose second derivative at 0 is NaN, and whose squares leave the range of float32
    where the norm does not: elements are divided by the largest of their sample first.
    """
    rows = widen(x).flatten(1) if x.dim() > 1 else widen(x)[:, None]
    if rows.shape[1] == 0:
        return rows.sum(1)
    largest = rows.detach().abs().amax(1, keepdim=True)
    usual = (largest > 0) & largest.isfinite()
    largest = torch.where(usual, largest, 1.0)
    square = (rows / largest).square().sum(1)
    nothing = square == 0
    return torch.where(nothing, 0.0, torch.where(nothing, 1.0, square).sqrt() * largest.squeeze(1))


@unrounded
def linear(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Logits [N, K] of features [N, D], weight [K, D] and bias [K], formed and kept in float32 at least."""
    return torch.nn.functional.linear(widen(features), widen(weight), None if bias is None else widen(bias))


def linear_energy(features: Tensor, weight: Tensor, bias: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """E = -T log sum_k exp((x . w_k + b_k) / T) of each row."""
    return energy(linear(features, weight, bias), temperature)


def linear_joint_energy(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """J = sum_k softplus(x . w_k + b_k) of each row."""
    return joint_energy(linear(features, weight, bias))


def linear_scores(
    features: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """energy, joint_energy, max_logit, argmax and msp = exp(max_logit + energy) of each row's logits."""
    z = linear(features, weight, bias)
    low = energy(z)
    max_logit, argmax = z.max(-1)
    return low, joint_energy(z), max_logit, argmax, (max_logit + low).exp()


def unit(rows: Tensor) -> Tensor:
    """Each row divided by its norm; a row of zeros stays one, with gradient zero, and one with a NaN is all NaN."""
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return torch.where(norm != 0, rows / torch.where(norm != 0, norm, 1.0), 0.0)


@unrounded
def alignment(features: Tensor, weight: Tensor) -> Tensor:
    """(1/K) sum_k |cos(x, w_k)| of each row."""
    cosines = unit(widen(features)) @ unit(widen(weight)).T
    return cosines.abs().sum(-1) / max(len(weight), 1)


@unrounded
def subspace_energy(features: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """inside = ||U^T x||^2 and outside = ||x - U U^T x||^2 of each row, for a basis U [D, r].

    The residual is formed and then squared: ||x||^2 - ||U^T x||^2 cancels where little is left outside.
    """
    x, u = widen(features), widen(basis)
    dtype = torch.promote_types(x.dtype, u.dtype)
    x, u = x.to(dtype), u.to(dtype)
    inside = x @ u
    outside = x - inside @ u.T
    return (inside * inside).sum(-1), (outside * outside).sum(-1)


@unrounded
def info_nce(
    queries: Tensor,
    keys: Tensor,
    target: Tensor | None,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    symmetric: bool = False,
    positives: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """log sum_j exp(s_ij) - mean of s_ij over the positives j of query i, with s = q k^T / temperature.

    The positives are key target[i], or with `positives` all keys of the query's label (none: the row is 0).
    Symmetric: the mean of that and of the keys' direction, log sum_i exp(s_ij) - mean of s_ij over the positives i
    of key j, taken at j = target[i], or with `positives` at j = i.
    """
    q, k = widen(queries), widen(keys)
    if normalize:
        q, k = unit(q), unit(k)
    s = q @ k.T / temperature

    def direction(s: Tensor, own: Tensor) -> Tensor:
        count = own.sum(-1)
        positive = torch.where(own, s, 0.0).sum(-1) / count.clamp_min(1)
        return torch.where(count > 0, -energy(s) - positive, 0.0)

    if positives is not None:
        own = positives[0][:, None] == positives[1][None, :]
        rows = direction(s, own)
        return (rows + direction(s.T, own.T)) / 2 if symmetric else rows
    assert target is not None
    picked = s.gather(1, target[:, None]).squeeze(1)
    rows = -energy(s) - picked
    return (rows + (-energy(s.T))[target] - picked) / 2 if symmetric else rows


def club(mean: Tensor, log_variance: Tensor, target: Tensor) -> Tensor:
    """(1/N) sum_i sum_d [ (1/N) sum_j (y_jd - mean_id)^2 - (y_id - mean_id)^2 ] / (2 exp(log_variance_id)).

    The pairs of rows i, j are not formed: the mean over j is v_d + (mean_id - ybar_d)^2, v the variance of the column.
    """
    mean, log_variance, target = widen(mean), widen(log_variance), widen(target)
    center = target.detach().sum(0) / max(len(target), 1)
    c = target - center
    c, m = c - c.sum(0) / max(len(target), 1), mean - center - c.sum(0) / max(len(target), 1)
    variance = c.square().sum(0) / max(len(target), 1)
    return ((variance + c * (2 * m - c)) * (-log_variance).exp()).sum() / (2 * max(len(target), 1))


def pairwise_hinge(id_score: Tensor, ood_score: Tensor, margin: float = 0.0) -> Tensor:
    """(1 / NM) sum_ij relu(ood_j - id_i + margin), 0 where there is no pair.

    In blocks of rows of the N x M pairs, each of which is formed again for its gradient.
    """
    id_score, ood_score = widen(id_score), widen(ood_score)
    N, M = len(id_score), len(ood_score)
    if N == 0 or M == 0:
        return (ood_score - id_score[:, None]).sum()

    def block(rows: Tensor) -> Tensor:
        return (ood_score - rows[:, None] + margin).relu().sum()

    size = max(1, (1 << 22) // M)
    parts = [
        checkpoint(block, rows, use_reentrant=False, preserve_rng_state=False) if size < N else block(rows)
        for rows in id_score.split(size)
    ]
    return torch.stack(parts).sum() / (N * M)


def distillation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(p || q) of p = softmax(teacher / T) and q = softmax(student / T) over the last dimension.

    As T^2 sum_k (q_k - p_k + p_k log(p_k / q_k)): the shares sum to 1, and so written no term is negative. p_k = 0
    leaves q_k; a teacher's row of all -inf, which has no softmax, gives 0.
    """
    s, t = widen(student_logits) / temperature, widen(teacher_logits) / temperature

    def log_share(z: Tensor) -> Tensor:
        return z + torch.where((low := energy(z)) == torch.inf, 0.0, low).unsqueeze(-1)

    log_q, log_p = log_share(s), log_share(t)
    q, p = log_q.exp(), log_p.exp()
    known = p != 0
    weighted = torch.where(known, p, 0.0) * (torch.where(known, log_p, 0.0) - torch.where(known, log_q, 0.0))
    taught = (t != -torch.inf).any(-1)
    return temperature * temperature * torch.where(taught, (q - p + weighted).sum(-1), 0.0)


def nearest_center(features: Tensor, centers: Tensor, normalize: bool = False) -> tuple[Tensor, Tensor]:
    """The index of the nearest center of each row, or with `normalize` of its unit, and the squared distance to it."""
    x, c = unit(widen(features)) if normalize else widen(features), widen(centers)
    distance, index = torch.cdist(x, c, compute_mode="donot_use_mm_for_euclid_dist").square().min(-1)
    return index, distance


def cluster_extremes(score: Tensor, cluster: Tensor, clusters: int, per_side: int = 1) -> tuple[Tensor, Tensor]:
    """Indices [clusters, per_side] of the lowest and of the highest scores of each cluster, -1 where there are fewer.

    In the order of the score, then of the index; NaN are left out.
    """

    def side(score: Tensor) -> Tensor:
        order = (~score.isnan()).nonzero().squeeze(1)
        order = order[score[order].argsort(stable=True)]
        order = order[cluster[order].argsort(stable=True)]
        of = cluster[order]
        counts = torch.bincount(of, minlength=clusters)
        rank = torch.arange(len(order), device=score.device) - (counts.cumsum(0) - counts)[of]
        found = torch.full((clusters, per_side), -1, dtype=torch.int64, device=score.device)
        kept = rank < per_side
        found[of[kept], rank[kept]] = order[kept]
        return found

    return side(score), side(-score)


def best(values: Tensor, indices: Tensor, k: int, largest: bool = True) -> tuple[Tensor, Tensor]:
    """The k best values and their indices, the best first, the lower index first of equal values."""
    order = indices.argsort()
    order = order[values[order].argsort(stable=True, descending=largest)[:k]]
    return values[order], indices[order]


def orthonormal_basis(weight: Tensor, rank: int | None = None) -> Tensor:
    """The leading `rank` right singular vectors [D, r] of weight [K, D]: an orthonormal basis of its row space.

    By default as many as singular values exceed max(K, D) eps times the largest, eps that of weight's dtype.
    """
    factor = weight.double()
    if len(factor) > factor.shape[1]:  # the row space of the small triangular factor is the same
        factor = torch.linalg.qr(factor, mode="r").R
    _, values, vectors = torch.linalg.svd(factor, full_matrices=False)
    if rank is None:
        largest = values[0] if len(values) else 0.0
        eps = torch.finfo(weight.dtype).eps
        rank = int((values > max(weight.shape) * eps * largest).sum())
    return vectors[:rank].T.float().contiguous()
