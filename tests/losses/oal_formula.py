"""OAL's loss written out in float64, and batches for it."""

import torch
import torch.nn.functional as F

from oodkern.losses.oal import OALLoss

N, D, K, U, LATENTS = 11, 8, 5, 6, (6, 12)
EVERY = {
    "literal": {},
    "mle": {"club_mode": "mle", "temperature": 2.5},
    "one bank": {"latents": (7,), "weight_mi": 0.3},
    "infonce": {"contrast": "infonce", "weight_logits": 1.5, "weight_features": 0.5},
    "identity": {"transfer": "identity", "teacher_features": D, "latents": (D,), "contrast": "infonce"},
}


def build(dtype=torch.float64, **options):
    torch.manual_seed(2)
    loss = OALLoss(**{"features": D, "classes": K, "teacher_features": U, "latents": LATENTS} | options).to(dtype)
    with torch.no_grad():
        for name, buffer in loss.named_buffers():  # as after a while
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape))
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape) + 0.5)
            elif name == "prototypes":
                buffer.copy_(torch.randn(buffer.shape) * 0.1)
        for parameter in loss.transfer.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return loss


def batch(loss, rows=N, dtype=torch.float64, scale=3.0, outliers=N + 2):
    """features, logits, target, outlier_latents, teacher_logits, teacher_features."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    target = torch.randint(K, (rows,), generator=generator)
    banks = [normal(outliers, size) for size in loss.latents]
    return [
        normal(rows, loss.features).relu(),
        normal(rows, K),
        target,
        banks,
        normal(rows, K),
        normal(rows, loss.teacher_features),
    ]


def transferred(loss, u, running=False):
    if loss.transfer_kind == "identity":
        return u
    t = loss.transfer

    def normalise(norm, rows):
        center, variance = norm.running_mean, norm.running_var
        if not running:
            center, variance = rows.mean(0), rows.var(0, correction=0)
            with torch.no_grad():
                norm.running_mean.lerp_(center, 0.1)
                norm.running_var.lerp_(rows.var(0), 0.1)
        return (rows - center) / (variance + norm.eps).sqrt() * norm.weight + norm.bias

    return normalise(t.last, (normalise(t.first, u) @ t.linear.weight.T + t.linear.bias).relu())


def dense_club(mean, log_variance, y):
    """All pairs, [N, N, D]."""
    pairs = -(y[None] - mean[:, None]).square().mean(1)
    own = -(y - mean).square()
    return ((own - pairs) / (2 * log_variance.exp())).sum(-1).mean()


def kl(teacher, student, T=1.0):
    p = F.softmax(teacher / T, -1)
    return T * T * (p * (F.log_softmax(teacher / T, -1) - F.log_softmax(student / T, -1))).sum(-1).mean()


def formula(loss, h, z, y, banks, t, u):
    """The loss as a number, and what its gradient is the gradient of."""
    value = F.cross_entropy(z, y) + loss.weight_logits * kl(t, z, loss.temperature)
    value = value + loss.weight_features * kl(transferred(loss, u), h)
    if loss.contrast == "infonce":
        prototypes = []
        for k in range(K):
            own = h.detach()[y == k]
            before = loss.prototypes[k]
            prototypes.append(before if len(own) == 0 else 0.9 * before + 0.1 * F.normalize(own.mean(0), dim=0))
        keys = torch.cat([torch.stack(prototypes), transferred(loss, banks[0], running=True).detach()])
        return value + loss.weight_mi[0] * F.cross_entropy(F.normalize(h) @ F.normalize(keys).T / 0.1, y), 0.0
    extra = 0.0
    for q, x, weight in zip(loss.conditionals, banks, loss.weight_mi, strict=False):
        mean, log_variance = q.mean(x[: len(h)]), q.log_variance(x[: len(h)])
        if loss.club_mode == "mle":
            normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
            extra = extra - normal.log_prob(h.detach()).sum(-1).mean()
            mean, log_variance = mean.detach(), log_variance.detach()
        value = value + weight * dense_club(mean, log_variance, h)
    return value, extra
