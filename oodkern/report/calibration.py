"""The figure of a calibration."""

from __future__ import annotations

import numpy as np

from oodkern.report.plots import ID_COLOUR, OOD_COLOURS, STYLE, as_svg
from oodkern.training.calibration import Calibration


def calibration_figure(found: Calibration) -> str:
    """An SVG of the energies of ID images and outliers, each as a density, with the proposed margins."""
    import matplotlib
    from matplotlib.figure import Figure

    sides = (("ID", found.id_energies, ID_COLOUR), ("outliers", found.outlier_energies, OOD_COLOURS[0]))
    bins = np.histogram_bin_edges(np.concatenate([values.numpy() for _, values, _ in sides]), bins=60)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axes = figure.subplots()
        for name, values, colour in sides:
            axes.hist(values.numpy(), bins.tolist(), density=True, color=(colour, 0.45), edgecolor=colour, label=name)
        for name, at, colour in (
            ("margin_in", found.margin_in, ID_COLOUR),
            ("margin_out", found.margin_out, OOD_COLOURS[0]),
        ):
            axes.axvline(at, color=colour, linestyle="--", linewidth=1.6, label=f"{name} {at:.4g}")
        axes.set_xlabel("energy (low: in-distribution)")
        axes.set_ylabel("density")
        axes.set_title("held-out images, and the proposed margins")
        axes.legend()
        (drawn,) = as_svg([figure])
    return drawn
