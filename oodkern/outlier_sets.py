"""Which of several sets of images to take as outliers: EDGE's dilation distance between spectra of features."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from oodkern.classifier import Classifier
from oodkern.data import ImageSet
from oodkern.ops._checks import check_count, check_floating

LARGEST_SEED = 2**63 - 1  # of a torch.Generator


@dataclass(frozen=True)
class RankedSet:
    """A candidate, how far it is from the ID set, and what that was computed from.

    `images` are those of the set, of which `batches` batches were read. `spectrum` and `known_spectrum`, each [b]
    float64 on the CPU, are the mean spectra of the candidate and of the ID set.
    """

    name: str
    images: int
    batches: int
    distance: float
    standard_error: float  # NaN of one batch
    spectrum: Tensor
    known_spectrum: Tensor

    def told_apart(self, other: RankedSet) -> bool:
        """Whether the two distances differ by more than two standard errors of their difference, at the most.

        The distances share the ID batches, which may move them together or apart; the deviation of a difference is
        never more than the sum of the deviations.
        """
        return abs(self.distance - other.distance) > 2 * (self.standard_error + other.standard_error)


@torch.no_grad()
def batch_spectra(batches: Iterable[Tensor]) -> Tensor:
    """The singular values of each of B batches, descending: [B, b] float64. See `mean_spectrum`."""
    found: list[Tensor] = []
    shape: tuple[int, ...] = ()
    for features in batches:
        check_floating(features, "batches")
        if features.dim() != 2 or 0 in features.shape:
            raise ValueError(f"batches: expected each [b, D] with b, D >= 1, got {list(features.shape)}")
        shape = shape or tuple(features.shape)
        if tuple(features.shape) != shape:
            raise ValueError(f"batches: expected each {list(shape)}, as the first is, got {list(features.shape)}")
        wide = features.double()  # which autocast leaves alone
        # Both products have the squares of the singular values; of the larger one the others are zero but for
        # rounding.
        gram = wide @ wide.T if shape[0] <= shape[1] else wide.T @ wide
        if not torch.isfinite(gram).all():
            raise ValueError("batches: expected finite features, got some that are not")
        values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0)
        found.append(torch.cat([values, values.new_zeros(shape[0] - len(values))]))
    if not found:
        raise ValueError("batches: expected one at least, got none")
    return torch.stack(found)


def mean_spectrum(batches: Iterable[Tensor]) -> Tensor:
    """The mean over batches of the singular values s_1 >= ... >= s_b of a batch of features, as they are.

    Features are neither centred nor normalised, so s_1 is mostly their mean, and all values grow with the size of the
    batch: spectra of batches of different sizes cannot be compared. It is the mean of spectra, not the spectrum of
    all images together.

    Args:
        batches: each [b, D], all of one shape; float64, float32, bfloat16 or float16.

    Returns:
        [b] float64 on the device of the batches; beyond D all zeros.

    The values are roots of the eigenvalues of X Xᵀ [b, b] (or of Xᵀ X where D < b), formed in float64: 3 to 5 times
    as fast as `torch.linalg.svdvals` for b = 64 and D = 512 or 2,048. Squares cancel: s_i has an error of about
    eps s_1² / (2 s_i), and what is below sqrt(eps) s_1 = 1.5e-8 s_1 is lost. That is less than the rounding of the
    features themselves, which are float32 at best (6e-8); the leading values, which are what is compared, are right
    to 1e-14 s_1.

    Not differentiable. Raises TypeError for a batch of another dtype, ValueError for one of another shape than the
    first, one that is not finite, or none.

    Source: the data-set selection (OESM) of EDGE, Sun et al., AAAI 2025, as its released oe.py computes it.
    """
    return batch_spectra(batches).mean(0)


def dilation_distance(known: Tensor, unknown: Tensor, top: int = 32) -> float:
    """|| known[:top] - unknown[:top] ||_2 of two mean spectra [b]: the Frobenius norm of the diagonal matrices.

    Raises ValueError for spectra that are not both [b], or for a `top` that is not from 1 to b.

    Source: EDGE, Sun et al., AAAI 2025 (k = 32 of batches of 64).
    """
    for name, spectrum in (("known", known), ("unknown", unknown)):
        check_floating(spectrum, name)
        if spectrum.dim() != 1 or len(spectrum) != len(known):
            raise ValueError(
                f"{name}: expected [b], spectra of batches of one size, got {list(known.shape)} and "
                f"{list(unknown.shape)}"
            )
    check_top(top, len(known))
    return float((known.double() - unknown.double())[:top].norm())


def check_top(top: int, largest: int) -> None:
    check_count(top, "top", 1)
    if top > largest:
        raise ValueError(f"top: expected at most {largest}, the singular values of a batch, got {top}")


def distance_error(known: Tensor, unknown: Tensor, top: int) -> float:
    """The standard error of the dilation distance of the means of spectra [B, b]; NaN for B = 1.

    d = |m| with m = mean(known) - mean(unknown), whose derivative is u = m / d. To first order d moves with the batches
    as u . known_i / B and -u . unknown_i / B do, which are drawn independently:
    var d = (var_i u . known_i + var_i u . unknown_i) / B.
    """
    known, unknown = known[:, :top], unknown[:, :top]
    gap = known.mean(0) - unknown.mean(0)
    along = gap / gap.norm().clamp_min(torch.finfo(gap.dtype).tiny)
    if len(known) == 1:
        return float("nan")
    return float((((known @ along).var() + (unknown @ along).var()) / len(known)).sqrt())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; then each module is in the mode it was in, also those that a user froze."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def drawn_features(
    classifier: Classifier, images: ImageSet, batch_size: int, batches: int, seed: int
) -> Iterator[Tensor]:
    """Features [batch_size, D] of `batches` batches of images, drawn without replacement.

    The draw is one of (seed, number of images) alone, so that a further candidate changes no other's distance.
    """
    device = next(classifier.parameters()).device
    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: batches * batch_size]
    for indices in drawn.split(batch_size):
        yield classifier.features(images.images(indices).to(device))


@torch.no_grad()
def rank_outlier_sets(
    classifier: Classifier,
    known: ImageSet,
    candidates: Mapping[str, ImageSet],
    batch_size: int = 64,
    batches: int | None = None,
    top: int = 32,
    seed: int = 0,
) -> list[RankedSet]:
    """Candidates by their dilation distance to the ID set, the closest first.

    The closest is the recommended one: its features spread as those of the ID images do, so its images are near them,
    and near outliers are the informative ones. That direction is an inference: the source prints the distances and
    does not say which to prefer.

    Images are taken as they are and the model is in evaluation mode (its own mode is restored), so that a distance
    depends on the images and `seed` alone. The released code left the network in training mode, where BatchNorm
    normalises each batch by itself and takes part of the difference away, and augmented the images.

    Args:
        classifier: whose penultimate features are compared, on its device. The source takes a network that was
            trained with none of the candidates; so should you.
        known: ID images.
        candidates: a name to images of the shape of `known`.
        batch_size: b, rows of each batch.
        batches: at most so many of each set; by default as many as the smallest set has. It is the same number for
            each set, drawn without replacement.
        top: how many singular values count.
        seed: of the draw, from 0.

    Returns:
        a RankedSet for each candidate. Where a candidate is like the ID set its distance is not 0 but about the noise
        of the means: E d² is the square of the true one plus the traces of their covariances.

    Raises ValueError, before any work is done, for a set with fewer than `batch_size` images or of another shape,
    naming it, for no candidates, or for a number out of its range; TypeError for a model that is no Classifier.
    Raises ValueError with the name of a set whose features are not finite.

    Source: EDGE, Sun et al., AAAI 2025.
    """
    if not isinstance(classifier, Classifier):
        raise TypeError(f"classifier: expected an oodkern.classifier.Classifier, got {type(classifier).__name__}")
    for name, number in (("batch_size", batch_size), ("batches", 1 if batches is None else batches)):
        check_count(number, name, 1)
    check_top(top, batch_size)
    check_count(seed, "seed", 0)
    if seed > LARGEST_SEED:
        raise ValueError(f"seed: expected less than 2^63, got {seed}")
    if not candidates:
        raise ValueError("candidates: expected one set at least, got none")
    sets = {"known": known} | {f"candidates[{name!r}]": images for name, images in candidates.items()}
    for title, images in sets.items():
        if len(images) < batch_size:
            raise ValueError(f"{title}: expected {batch_size} images at least, which make a batch, got {len(images)}")
    for title, images in sets.items():
        if images.shape != known.shape:
            raise ValueError(f"{title}: expected images of shape {known.shape}, as known are, got {images.shape}")
    count = min(len(images) // batch_size for images in sets.values())
    count = count if batches is None else min(batches, count)
    found: list[Tensor] = []
    with evaluating(classifier):
        for title, images in sets.items():
            try:
                found.append(batch_spectra(drawn_features(classifier, images, batch_size, count, seed)).cpu())
            except ValueError as error:
                raise ValueError(f"{title}: {error}") from error
    of_known, *of_candidates = found
    known_spectrum = of_known.mean(0)
    ranked = [
        RankedSet(
            name=name,
            images=len(images),
            batches=count,
            distance=dilation_distance(known_spectrum, spectra.mean(0), top),
            standard_error=distance_error(of_known, spectra, top),
            spectrum=spectra.mean(0),
            known_spectrum=known_spectrum,
        )
        for (name, images), spectra in zip(candidates.items(), of_candidates, strict=True)
    ]
    return sorted(ranked, key=lambda one: one.distance)
