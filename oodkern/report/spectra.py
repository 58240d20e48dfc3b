"""A ranking of outlier sets, told: as a figure, as a table, as a record for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from oodkern.outlier_sets import RankedSet
from oodkern.report.plots import ID_COLOUR, STYLE, as_svg, coloured
from oodkern.tables import aligned

# Of the largest singular value of float32 features: what is smaller is rounding.
VISIBLE = 1e-7


def outlier_set_figure(ranked: Sequence[RankedSet], top: int) -> str:
    """An SVG of two panels: the spectra of the ID set and of each candidate, and the distances, the closest above.

    `ranked` is what `rank_outlier_sets` gave with that `top`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    colours = coloured(one.name for one in ranked)
    with matplotlib.rc_context(STYLE):
        # One figure, as it is one file: two beside each other would repeat each other's ids.
        figure = Figure(figsize=(10.4, max(3.6, 1.3 + 0.32 * len(ranked))), layout="constrained")
        spectra, bars = figure.subplots(1, 2)
        spectra.plot(*points(ranked[0].known_spectrum), color=ID_COLOUR, linewidth=2.6, label="ID")
        for one in ranked:
            spectra.plot(
                *points(one.spectrum), ".-", color=colours[one.name], markersize=3, linewidth=1.4, label=one.name
            )
        spectra.axvline(top, color="#999", linewidth=0.8, linestyle="--")
        spectra.set_yscale("log")
        spectra.set_xlabel(f"singular value (the dashed line: the first {top} are compared)")
        spectra.set_ylabel("mean over the batches")
        spectra.set_title("spectra of the features")
        spectra.legend()
        bars.barh(
            range(len(ranked)),
            [one.distance for one in ranked],
            xerr=np.nan_to_num([one.standard_error for one in ranked]),  # of one batch there is none
            color=[(colours[one.name], 0.5) for one in ranked],
            edgecolor=[colours[one.name] for one in ranked],
            ecolor="#333",
            capsize=3,
        )
        bars.set_yticks(range(len(ranked)), [one.name for one in ranked])
        bars.invert_yaxis()
        bars.set_xlim(left=0)
        bars.grid(visible=False, axis="y")
        bars.set_xlabel("dilation distance to the ID set, +- its standard error")
        bars.set_title("the closest is above")
        (drawn,) = as_svg([figure])
    return drawn


def points(spectrum: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Numbers 1, 2, ... and singular values; those that a logarithmic axis cannot or should not show are NaN."""
    values = spectrum.numpy()
    return np.arange(1, len(values) + 1), np.where(values > VISIBLE * values[0], values, np.nan)


def ranking_table(ranked: Sequence[RankedSet], batch_size: int) -> str:
    """The ranking and what it says, for people."""
    head = ("rank", "set", "images", "distance", "+-")
    rows = [
        (str(rank), one.name, f"{one.images:,}", f"{one.distance:.4g}", f"{one.standard_error:.2g}")
        for rank, one in enumerate(ranked, 1)
    ]
    closest, *others = ranked
    alike = ", ".join(one.name for one in others if not closest.told_apart(one))
    doubt = f" By these images it cannot be told apart from {alike}." if alike else ""
    return (
        f"{aligned(head, rows, words=(1,))}\n\n"
        f"Closest: {closest.name}.{doubt}\n"
        "The smallest distance is recommended: the spectrum of that set's features is closest to the ID set's, so its\n"
        "images are near the known ones, and near outliers are the informative ones. The source (EDGE, AAAI 2025)\n"
        "computes the distance and does not state which direction is meant.\n\n"
        f"From batches of {batch_size} images, {closest.batches:,} of each set; +- is the standard error over them."
    )


def ranking_record(ranked: Sequence[RankedSet], sources: Mapping[str, str]) -> dict[str, Any]:
    """The ranking for programs: what JSON can hold, a standard error that is not there as None."""
    closest, *others = ranked
    return {
        "batches": closest.batches,
        "closest": closest.name,
        "not_told_apart": [one.name for one in others if not closest.told_apart(one)],
        "sets": [
            {
                "rank": rank,
                "name": one.name,
                "source": sources[one.name],
                "images": one.images,
                "distance": one.distance,
                "standard_error": one.standard_error if math.isfinite(one.standard_error) else None,
                "spectrum": one.spectrum.tolist(),
            }
            for rank, one in enumerate(ranked, 1)
        ],
        "id_spectrum": closest.known_spectrum.tolist(),
    }
