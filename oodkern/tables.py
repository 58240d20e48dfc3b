"""Tables for people: aligned text, numbers in percent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oodkern.training import Evaluation, Run

LEGEND = (
    "In percent. AUROC, AUPR: OOD positive, higher is better. FPR95: ID images flagged where\n"
    "95 % of OOD images are; FPR95(ID+): OOD images accepted where 95 % of ID images are; lower is better."
)


CERTIFICATE = (
    "Local certified radius |threshold - S(x)| / ||grad S(x)||, median and quartiles: how far, in the L2 norm of\n"
    "pixels in [0, 1], an image is from the threshold to first order. Heuristic for non-linear networks, whose\n"
    "gradient at an image tells of the score near it alone."
)


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], words: Iterable[int] = ()) -> str:
    """Columns padded to their widest cell, numbers to the right, columns of `words` to the left."""
    left = set(words)
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Iterable[str]) -> str:
        padded = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(padded).rstrip()

    return "\n".join([line(head), line("-" * width for width in widths), *map(line, rows)])


def evaluation_head(multi_label: bool) -> tuple[str, ...]:
    quality = "ID mAP" if multi_label else "ID accuracy"
    return ("model", "score", quality, "OOD set", "AUROC", "AUPR", "FPR95", "FPR95(ID+)")


def evaluation_rows(model: str, one: Evaluation) -> list[tuple[str, ...]]:
    """A row for each OOD set."""
    rows = []
    for name, found in one.ood.items():
        numbers = (found.auroc, found.aupr_out, found.fpr95_ood_positive, found.fpr95_id_positive)
        rows.append((model, one.score_name, percent(one.accuracy), name, *map(percent, numbers)))
    return rows


def evaluation_table(named: Sequence[tuple[str, Evaluation]], multi_label: bool) -> str:
    rows = [row for name, one in named for row in evaluation_rows(name, one)]
    return f"{aligned(evaluation_head(multi_label), rows, words=(0, 1, 3))}\n\n{LEGEND}"


def certificate_table(by_set: Mapping[str, Mapping[str, Any]]) -> str:
    """What `oodkern.training.certify` found of each set; how many radii are NaN, where some are."""
    undefined = any("undefined" in found for found in by_set.values())
    head = ["set", "images", "accepted", "radius of these", "radius of the flagged", "gradient's norm"]
    head += ["undefined"] if undefined else []

    def shown(values: Sequence[float] | None) -> str:
        return "" if values is None else f"{values[1]:.3g} ({values[0]:.3g} .. {values[2]:.3g})"

    rows = [
        (
            "ID" if name == "id" else name,
            f"{found['images']:,}",
            percent(found["share_accepted"]),
            *(shown(found[key]) for key in ("accepted", "flagged", "gradient_norm")),
            *([f"{found.get('undefined', 0):,}"] if undefined else []),
        )
        for name, found in by_set.items()
    ]
    return f"{aligned(head, rows, words=(0,))}\n\n{CERTIFICATE}"


def run_table(run: Run) -> str:
    """The baseline by the better of its scores, then the method."""
    named = [("baseline", run.best_baseline), (run.config.method, run.method)]
    others = ", ".join(one.score_name for one in run.baseline)
    note = f"\nThe baseline is judged by the score that serves it better on these sets, of {others}."
    return evaluation_table(named, run.split.multi_label) + note
