"""Outliers that a text-to-image diffusion model makes of words that are none: an adapter to diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from oodkern.ops._checks import check_count, check_non_negative
from oodkern.ops._product import check_matrix
from oodkern.synthesis.bank import as_vectors


@torch.no_grad()
def diffusion_latents(
    pipeline: Any,
    class_names: Sequence[str],
    outliers: Mapping[str, Tensor] | Sequence[Tensor] | None,
    count: int,
    generator: torch.Generator,
    steps: int = 50,
    guidance: float = 7.5,
    prompt: str = "A high-quality image of the {}",
    batch: int = 1,
) -> Tensor:
    """Latents of images of classes whose word means something else: [M, d] outliers for a bank, M = count.

    For each of them a class and one of its outliers are drawn at random; the embedding of the class's token is
    overwritten by that outlier, the prompt is encoded, the embedding restored; the diffusion model makes a latent of
    that [c, h, w], of which no image is decoded, and which is averaged over channels, then over height: d = w, 64 for
    Stable Diffusion. Of a name of several tokens the last one is overwritten ("maple tree": tree).

    Args:
        pipeline: diffusers' StableDiffusionPipeline (or one with its `tokenizer`, `text_encoder`, `encode_prompt` and
            call), on its device, in its dtype, with its scheduler; OAL used Stable Diffusion 1.4 with PLMS, its own
            PNDMScheduler. Or the name or folder of one, loaded by diffusers onto the generator's device.
        class_names: K names, as the tokenizer's words.
        outliers: token embeddings [m, d_text] of each class, K of them or by name, such as those of
            `boundary_outliers` at norms of token embeddings; None: the names as they are.
        count: M, how many latents.
        generator: of all randomness. Each latent has a seed of its own, so that `batch` changes rounding alone.
        steps, guidance: of the sampler; guidance above 1 runs the model for the empty prompt too.
        prompt: the text, with {} for the name.
        batch: how many latents are made at once.

    Returns:
        [M, d] float32, on the pipeline's device.

    The weights of the text encoder are changed while a prompt is encoded, and are what they were afterwards, also when
    an exception is raised. Raises TypeError or ValueError for an argument of the wrong kind or shape; ImportError where
    a pipeline is named and diffusers or transformers is not installed.

    Source: Gao, Li, OAL (arXiv 2406.16525), and its released code.
    """
    check_count(count, "count", 1)
    check_count(steps, "steps", 1)
    check_count(batch, "batch", 1)
    check_non_negative(guidance, "guidance")
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    if isinstance(class_names, str) or not class_names or not all(isinstance(name, str) for name in class_names):
        raise ValueError(f"class_names: expected names of one class or more, got {class_names!r}")
    if not isinstance(prompt, str) or "{}" not in prompt:
        raise ValueError(f"prompt: expected a text with {{}} for the name of the class, got {prompt!r}")
    embeddings = _of_classes(outliers, class_names)
    if isinstance(pipeline, str) or hasattr(pipeline, "__fspath__"):
        pipeline = _load(pipeline, generator.device)
    words = pipeline.text_encoder.get_input_embeddings().weight
    for name, rows in zip(class_names, embeddings, strict=True):
        if rows is not None and rows.shape[1] != words.shape[1]:
            raise ValueError(f"outliers of {name}: expected [m, {words.shape[1]}], got {list(rows.shape)}")
    tokens = [_token(pipeline.tokenizer, name) for name in class_names]

    def below(limit: int, size: int) -> list[int]:
        return torch.randint(limit, (size,), generator=generator, device=generator.device).tolist()

    device, guided = pipeline.unet.device, guidance > 1
    classes, seeds = below(len(class_names), count), below(2**62, count)
    encoded: list[tuple[Tensor, Tensor | None]] = []
    found = []
    for i, label in enumerate(classes):
        rows = embeddings[label]
        row = None if rows is None else rows[below(len(rows), 1)[0]]
        with _overwritten(words, tokens[label], row):
            encoded.append(pipeline.encode_prompt(prompt.format(class_names[label]), device, 1, guided))
        if len(encoded) < batch and i + 1 < count:
            continue
        texts, empty = zip(*encoded, strict=True)
        made = pipeline(
            prompt_embeds=torch.cat(texts),
            negative_prompt_embeds=torch.cat(empty) if guided else None,
            num_inference_steps=steps,
            guidance_scale=guidance,
            # On the CPU, as diffusers advises: the same numbers on every device.
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[i + 1 - len(encoded) : i + 1]],
            output_type="latent",
        ).images
        found.append(as_vectors(made.float()))
        encoded = []
    return torch.cat(found)


def _of_classes(outliers: Any, class_names: Sequence[str]) -> list[Tensor | None]:
    """One matrix of token embeddings a class, or None."""
    if outliers is None:
        return [None] * len(class_names)
    if isinstance(outliers, Mapping):
        missing = [name for name in class_names if name not in outliers]
        if missing:
            raise ValueError(f"outliers: expected some of each class, got none of {', '.join(missing)}")
        outliers = [outliers[name] for name in class_names]
    if not isinstance(outliers, tuple | list):
        raise TypeError(f"outliers: expected a tensor a class, a list or by name, got {type(outliers).__name__}")
    if len(outliers) != len(class_names):
        raise ValueError(f"outliers: expected {len(class_names)} tensors, one a class, got {len(outliers)}")
    for name, rows in zip(class_names, outliers, strict=True):
        check_matrix(rows, f"outliers of {name}", "m, d_text")
        if len(rows) == 0:
            raise ValueError(f"outliers of {name}: expected one or more, got none")
    return list(outliers)


def _token(tokenizer: Any, name: str) -> int:
    """The last token of a name."""
    tokens = tokenizer(name, add_special_tokens=False).input_ids
    if not tokens:
        raise ValueError(f"class_names: expected words, got {name!r}, of which the tokenizer makes no token")
    return int(tokens[-1])


@contextmanager
def _overwritten(words: Tensor, token: int, row: Tensor | None) -> Iterator[None]:
    """The embedding of a token is `row` (None: its own), and afterwards what it was, to the bit."""
    before = words[token].clone()
    try:
        if row is not None:
            words[token] = row.to(words)
        yield
    finally:
        words[token] = before


def _load(name: Any, device: torch.device) -> Any:
    try:
        import transformers  # noqa: F401  (which diffusers needs for text, and misses later, with another error)
        from diffusers import StableDiffusionPipeline
    except ImportError:
        raise ImportError("diffusion_latents needs diffusers: pip install 'oodkern[synthesis]'") from None
    return StableDiffusionPipeline.from_pretrained(name).to(device)
