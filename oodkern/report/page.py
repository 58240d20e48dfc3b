"""The page: configuration, results, figures, and the images that are hardest. No script, no request to anywhere."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from oodkern.config import to_yaml
from oodkern.data import ImageSet
from oodkern.detector import name_of, predicted
from oodkern.report import plots
from oodkern.tables import LEGEND, evaluation_head, evaluation_rows
from oodkern.training import files
from oodkern.training.evaluation import SAMPLE, logits_of, scored
from oodkern.training.folder import environment

if TYPE_CHECKING:
    from oodkern.training import Run

THUMBNAILS = 24
STYLE = (Path(__file__).parent / "page.css").read_text()


def write_report(run: Run) -> Path:
    """Writes report.html into the run folder."""
    import matplotlib

    with matplotlib.rc_context(plots.STYLE):
        content = page(run)
    path = run.folder / "report.html"
    files.write_text(path, content)
    return path


def page(run: Run) -> str:
    title = f"{run.config.method} on {run.split.name}, seed {run.config.seed}"
    body = "\n".join([header(run, title), results(run), figures(run), hardest(run), settings(run)])
    return document(title, body)


def document(title: str, body: str) -> str:
    """A page that needs no other file."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} - oodkern</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n"
        "</main>\n</body>\n</html>\n"
    )


def header(run: Run, title: str) -> str:
    facts = {
        "trained in": f"{run.seconds:.0f} s",
        "model": run.config.model.name,
        "threshold": f"{run.threshold:.4g} ({run.method.score_name})",
    }
    items = "".join(f"<li><b>{escape(value)}</b> {escape(name)}</li>" for name, value in facts.items())
    return (
        f"<header><h1>{escape(title)}</h1><p>{escape(run.split.describe())}.</p><ul class='facts'>{items}</ul></header>"
    )


def results(run: Run) -> str:
    head = evaluation_head(run.split.multi_label)
    models = [("baseline", run.best_baseline), (run.config.method, run.method)]
    rows = [row for name, one in models for row in evaluation_rows(name, one)]
    # The better of the two models in each column of numbers, for each OOD set: lower for the FPRs.
    half = len(rows) // 2
    cells = []
    for i, row in enumerate(rows):
        rival = rows[(i + half) % len(rows)]
        line = []
        for column, text in enumerate(row):
            number = column == 2 or column > 3
            mine, other = (float(text), float(rival[column])) if number else (0.0, 0.0)
            better = mine < other if column >= 6 else mine > other
            line.append(f"<td class='{'number' if number else ''}{' better' if better else ''}'>{escape(text)}</td>")
        cells.append(f"<tr class='{'method' if i >= half else ''}'>{''.join(line)}</tr>")
    heads = "".join(f"<th class='{'number' if i == 2 or i > 3 else ''}'>{escape(h)}</th>" for i, h in enumerate(head))
    others = ", ".join(f"{one.score_name} {100 * one.mean_auroc:.1f}" for one in run.baseline)
    return (
        f"<section><h2>Result</h2><div class='scroll'><table><thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(cells)}</tbody></table></div>"
        f"<p class='note'>{escape(LEGEND)} The better of the two models in bold. The baseline, the model before "
        f"fine-tuning, is judged by the score that serves it better here (mean AUROC {escape(others)}).</p></section>"
    )


def figures(run: Run) -> str:
    score = run.method.score_name
    drawn = (
        (
            "Scores",
            plots.histograms(run),
            (f"Histogram of the {score} score before fine-tuning", f"Histogram of the {score} score after fine-tuning"),
            f"The {score} of the test images. The threshold accepts 95 % of the ID validation images.",
        ),
        (
            "ROC curves",
            plots.roc_curves(run),
            ("ROC curves of both models on every OOD set", "The same ROC curves on a logarithmic axis"),
            f"Both models by the {score}: dotted before, solid after fine-tuning. The line is at 95 % detected.",
        ),
        (
            "Training",
            plots.training_curves(run),
            ("The loss and its parts over the epochs", "Accuracy and AUROC on the validation images over the epochs"),
            "The held-out images of the training sets choose best.ckpt and the threshold; the test is looked at once.",
        ),
    )
    sections = []
    for name, panels, descriptions, note in drawn:
        images = "".join(
            f"<img class='figure' alt='{escape(alt)}' src='{data_uri(svg.encode(), 'image/svg+xml')}'>"
            for svg, alt in zip(panels, descriptions, strict=True)
        )
        sections.append(
            f"<section><h2>{name}</h2><div class='figures'>{images}</div><p class='note'>{escape(note)}</p></section>"
        )
    return "\n".join(sections)


def hardest(run: Run) -> str:
    """The OOD images that look most like ID ones, and the ID images that look least like it."""
    of_all = run.method.indices
    rows = [
        (f"OOD, {name}", images, of_all.get(name), run.method.scores[name], False)
        for name, images in run.split.test_ood.items()
    ]
    outliers = scored(run.model, run.split.outliers, {"": run.score}, limit=min(len(run.split.outliers), SAMPLE))
    rows.append(("Outliers trained with", run.split.outliers, outliers.indices, outliers.scores[""], False))
    rows.append(("ID, hardest to accept", run.split.test, of_all.get("id"), run.method.scores["id"], True))
    strips = "".join(strip(run, *row) for row in rows)
    return (
        "<section><h2>Hardest images</h2><p class='note'>The OOD images with the lowest scores, and the ID images with "
        "the highest: what the model takes each for, and the score. Framed in red: on the wrong side of the threshold."
        f"</p>{strips}</section>"
    )


def strip(run: Run, name: str, images: ImageSet, indices: Tensor | None, scores: Tensor, known: bool) -> str:
    """`indices` [N]: the images that scores [N] are of; None: all."""
    worst = scores.argsort(descending=known, stable=True)[:THUMBNAILS]
    shown = images.select(worst if indices is None else indices[worst])
    pixels = shown.images(torch.arange(len(shown)))
    labels = predicted(logits_of(run.model, shown), run.split.multi_label)
    wrong = scores > run.threshold if known else scores <= run.threshold
    names = [escape(name_of(label, run.split.classes)) for label in labels.tolist()]
    cells = "".join(
        f"<figure class='{'wrong' if wrong[i] else ''}'><img alt='' src='{thumbnail(image)}'>"
        f"<figcaption><b title='{name}'>{name}</b><span>{scores[i]:.2f}</span></figcaption></figure>"
        for i, image, name in zip(worst.tolist(), pixels, names, strict=True)
    )
    count = f"{int(wrong.sum()):,} of {len(scores):,} {'flagged' if known else 'accepted'}"
    return f"<h3>{escape(name)} <small>{count}</small></h3><div class='strip'>{cells}</div>"


def settings(run: Run) -> str:
    decided = "".join(f"{name}: {value}\n" for name, value in run.decided.items())
    blocks = [("Configuration", to_yaml(run.config)), ("Decided by the method", decided)]
    blocks.append(("Environment", "".join(f"{name}: {value}\n" for name, value in environment().items())))
    shown = "".join(f"<div><h3>{name}</h3><pre>{escape(text)}</pre></div>" for name, text in blocks if text)
    return f"<section><h2>Settings</h2><div class='settings'>{shown}</div></section>"


def thumbnail(image: Tensor) -> str:
    """A PNG of an image [C, H, W] in [0, 1]."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return data_uri(buffer.getvalue(), "image/png")


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
