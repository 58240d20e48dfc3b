"""The page of `oodkern check-data`: the parts, what is wrong, and the pairs. No script, no request to anywhere."""

from __future__ import annotations

from html import escape
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from oodkern import _files, tables
from oodkern.data import DataConfig
from oodkern.data.damage import ONE_IN
from oodkern.data.duplicates import ALIKE, FINE, RADIUS, SAME
from oodkern.data.inspection import Finding, Inspection, Pair
from oodkern.data.parts import Part
from oodkern.report.page import document, thumbnail

SIDE = 64  # pixels of a picture
GAP = 2
NAMED = 3  # pairs of a finding in a terminal
HEAD = ("part", "images", "read", "unreadable", "repeated", "flat", "classes", "fewest", "most")
LEGEND = (
    "Repeated: images equal in pixels to an earlier one of the same part. Flat: of almost one colour, for which no "
    "near-duplicates are looked for."
)
KINDS = {"file": "the same file", "pixels": "equal pixels", "same": "the same picture", "alike": "alike"}


def check_rows(found: Inspection) -> list[tuple[str, ...]]:
    rows = []
    for part in found.parts.values():
        facts = part.facts()
        numbers = [f"{facts[key]:,}" for key in HEAD[1:6]]
        classes = ["", "", ""]
        if one := facts["per_class"]:
            ends = [
                f"{count:,} {name if len(name) <= 24 else name[:23] + '…'}"
                for name, count in (one["least"], one["most"])
            ]
            classes = [f"{one['classes']:,}", *ends]
        rows.append((part.title, *numbers, *classes))
    return rows


def summary(found: Inspection) -> str:
    errors = sum(finding.level == "error" for finding in found.findings)
    warnings = len(found.findings) - errors
    counts = [f"{count:,} {word}{'s' * (count != 1)}" for count, word in ((errors, "error"), (warnings, "warning"))]
    return f"{found.split.name}: {counts[0]}, {counts[1]}" if found.findings else f"{found.split.name}: nothing wrong"


def left_out(found: Inspection) -> str:
    return "; ".join(f"{count:,} images, {reason}" for reason, count in found.left_out.items())


def check_text(found: Inspection) -> str:
    """The table of the parts and the findings, for a terminal."""
    C, H, W = found.split.train.shape
    lines = [tables.aligned(HEAD, check_rows(found), words=(0, 7, 8)), ""]
    lines.append(f"Images are {C} x {H} x {W}.")
    if found.left_out:
        lines.append(f"Training leaves out by itself: {left_out(found)}.")
    if found.limit:
        lines.append(f"At most {found.limit:,} images of each part were read.")
    lines.append("")
    for finding in found.findings:
        lines.append(f"{finding.level}: {finding.text}")
        for pair in finding.pairs[:NAMED]:
            left, right = finding.parts
            lines.append(f"  {left.where(pair.left)} and {right.where(pair.right)}: {told(pair)}")
    return "\n".join([*lines, summary(found)])


def told(pair: Pair) -> str:
    likeness = f", {pair.likeness:.3f}" if pair.kind in ("same", "alike") else ""
    return f"{KINDS[pair.kind]}{', mirrored' if pair.mirrored else ''}{likeness}"


def write_data_check(found: Inspection, path: Path, data: DataConfig) -> Path:
    """Writes the page to `path`, and returns that."""
    _files.write_text(path, page(found, data))
    return path


def page(found: Inspection, data: DataConfig) -> str:
    title = f"Data check: {found.split.name}"
    sections = [header(found, title), parts_table(found), findings(found), settings(data)]
    return document(title, "\n".join(sections))


def header(found: Inspection, title: str) -> str:
    facts = {"x".join(map(str, found.split.train.shape)): "pixels", f"{len(found.split.classes):,}": "ID classes"}
    items = "".join(f"<li><b>{escape(value)}</b> {escape(name)}</li>" for value, name in facts.items())
    more = f" At most {found.limit:,} images of each part were read." if found.limit else ""
    dropped = f" Training leaves out by itself: {left_out(found)}." if found.left_out else ""
    text = escape(f"{summary(found)}.{more}{dropped}")
    return f"<header><h1>{escape(title)}</h1><p>{text}</p><ul class='facts'>{items}</ul></header>"


def parts_table(found: Inspection) -> str:
    kinds = ["", *["class='number'"] * 6, "", ""]
    head = "".join(f"<th {kind}>{name}</th>" for kind, name in zip(kinds, HEAD, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td {kind}>{escape(cell)}</td>' for kind, cell in zip(kinds, row, strict=True))}</tr>"
        for row in check_rows(found)
    )
    return (
        f"<section><h2>Parts</h2><div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"</div><p class='note'>{escape(LEGEND)}</p></section>"
    )


def findings(found: Inspection) -> str:
    if not found.findings:
        shown = "<p>No picture is in two parts, no class is shared, every file can be read.</p>"
    else:
        shown = "".join(map(one_finding, found.findings))
    note = (
        f"Near-duplicates are pictures whose perceptual hashes (of the picture or its mirror image) differ in {RADIUS} "
        f"of 63 bits at most and whose detail correlates by {ALIKE} at least (alike), or by {SAME} and the finer "
        f"detail by {FINE} (the same picture). "
        "Copies with more than a rim of a pixel in 32 cut off are not found. Of each picture the likest one is shown. "
        f"Unreadable files are an error past one in {ONE_IN:,}."
    )
    return f"<section><h2>Findings</h2>{shown}<p class='note'>{escape(note)}</p></section>"


def one_finding(finding: Finding) -> str:
    colour = "#d2373b" if finding.level == "error" else "#993f00"
    mark = f"<b style='color:{colour}'>{finding.level}</b>"
    strip = "".join(figure(pair, *finding.parts) for pair in finding.pairs)
    text = f"<h3>{mark} {escape(finding.text)}</h3>"
    if not strip:
        return text
    more = finding.count - len(finding.pairs)
    rest = f"<p class='note'>The likest; {more:,} more are not shown.</p>" if more else ""
    columns = f"grid-template-columns:repeat(auto-fill,minmax({2 * SIDE + 20}px,1fr))"
    return f"{text}<div class='strip' style='{columns}'>{strip}</div>{rest}"


def settings(data: DataConfig) -> str:
    from omegaconf import OmegaConf

    text = OmegaConf.to_yaml(OmegaConf.structured(data))
    return f"<section><h2>Settings</h2><h3>data</h3><pre>{escape(text)}</pre></section>"


def figure(pair: Pair, left: Part, right: Part) -> str:
    """Two pictures side by side, their files, and how they are alike."""
    names = [part.where(index) for part, index in ((left, pair.left), (right, pair.right))]
    captions = "".join(f"<b title='{escape(name, quote=True)}'>{escape(short(name))}</b>" for name in names)
    image = side_by_side(picture(left, pair.left), picture(right, pair.right))
    alt = escape(f"{names[0]} and {names[1]}", quote=True)
    return (
        f"<figure><img alt='{alt}' style='width:{2 * SIDE + GAP}px;height:{SIDE}px' src='{thumbnail(image)}'>"
        f"<figcaption>{captions}<span>{escape(told(pair))}</span></figcaption></figure>"
    )


def short(name: str) -> str:
    """The file and its folder."""
    return "/".join(Path(name).parts[-2:])


def picture(part: Part, index: int) -> Tensor:
    """[3, H, W] with sides of at most SIDE pixels."""
    image = part.images.images(torch.tensor([index]))
    scale = SIDE / max(image.shape[2:])
    if scale < 1:
        image = interpolate(image, scale_factor=scale, mode="bilinear", antialias=True, align_corners=False)
    return image[0].expand(3, -1, -1)


def side_by_side(left: Tensor, right: Tensor) -> Tensor:
    gap = torch.ones(3, left.shape[1], max(round(GAP * left.shape[1] / SIDE), 1))
    return torch.cat([left, gap, right], 2)
