"""Latents of a small Stable Diffusion pipeline with random weights, made here of its configurations."""

import string
import sys

import pytest
import torch

from oodkern.synthesis import diffusion_latents

NAMES = ["cat", "oak tree", "dog"]


@pytest.fixture(scope="module")
def pipeline():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    words = ["a", "high", "-", "quality", "image", "of", "the", "cat", "oak", "tree", "dog"]
    letters = [*string.ascii_lowercase, "-"]
    marks = ["<|startoftext|>", "<|endoftext|>"]
    merges = list(dict.fromkeys(pair for word in words for pair in joins(word)))
    texts = [*marks, *letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    tokenizer = transformers.CLIPTokenizer(vocabulary, merges, model_max_length=20)
    text = transformers.CLIPTextConfig(
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=20,
    )
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=(4, 8),
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
    )
    made = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def joins(word):
    """The merges that make one token of a word."""
    parts = [*word[:-1], word[-1] + "</w>"]
    while len(parts) > 1:
        yield parts[0], parts[1]
        parts = [parts[0] + parts[1], *parts[2:]]


def words(pipeline):
    return pipeline.text_encoder.get_input_embeddings().weight


def make(pipeline, outliers=None, count=5, seed=1, names=NAMES, **options):
    return diffusion_latents(pipeline, names, outliers, count, torch.Generator().manual_seed(seed), steps=3, **options)


def embeddings(scale=1.0):
    generator = torch.Generator().manual_seed(2)
    return [scale * torch.randn(4, 16, generator=generator) for _ in NAMES]


def test_is_the_pipeline_on_the_prompts(pipeline):
    """Without outliers: the pipeline's own latents of its own prompts, from the same seeds."""
    latents = make(pipeline, count=4)
    generator = torch.Generator().manual_seed(1)
    classes = torch.randint(3, (4,), generator=generator).tolist()
    seeds = torch.randint(2**62, (4,), generator=generator).tolist()
    expected = pipeline(
        [f"A high-quality image of the {NAMES[label]}" for label in classes],
        num_inference_steps=3,
        guidance_scale=7.5,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images
    assert expected.shape == (4, 4, 4, 8)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, expected.mean((1, 2)), rtol=1e-4, atol=1e-5)


def test_outliers_take_the_place_of_the_token(pipeline):
    """As if the vocabulary had been trained so; other tokens are left alone, and the token is restored."""
    before = words(pipeline).detach().clone()
    row = torch.randn(1, 16) * 3
    latents = make(pipeline, [row], names=["oak tree"], count=2)
    assert torch.equal(words(pipeline), before)
    token = pipeline.tokenizer("tree", add_special_tokens=False).input_ids
    assert len(token) == 1, "a token of its own, in this vocabulary"
    with torch.no_grad():
        words(pipeline)[token] = row
        generator = torch.Generator().manual_seed(1)
        torch.randint(1, (2,), generator=generator)
        seeds = torch.randint(2**62, (2,), generator=generator).tolist()
        expected = pipeline(
            ["A high-quality image of the oak tree"] * 2,
            num_inference_steps=3,
            guidance_scale=7.5,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
        ).images.mean((1, 2))
        words(pipeline)[token] = before[token]
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    assert (latents - make(pipeline, None, names=["oak tree"], count=2)).abs().max() > 1e-3


def test_every_outlier_is_drawn_and_the_generator_alone_decides(pipeline):
    one, again, other = (make(pipeline, embeddings(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    by_name = make(pipeline, dict(zip(NAMES, embeddings(), strict=True)))
    assert torch.equal(by_name, one)
    assert len({tuple(row.tolist()) for row in one}) == len(one)


@pytest.mark.parametrize("guidance", [7.5, 0.0])
def test_batches_change_rounding_alone(pipeline, guidance):
    one, two, all_at_once = (make(pipeline, embeddings(), guidance=guidance, batch=batch) for batch in (1, 2, 5))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one, all_at_once, rtol=1e-4, atol=1e-5)
    assert one.shape == (5, 8)
    unguided = make(pipeline, embeddings(), guidance=1.0)
    assert torch.equal(unguided, one) == (guidance == 0)


def test_embeddings_are_restored_after_an_exception(pipeline, monkeypatch):
    before = words(pipeline).detach().clone()
    seen = []

    def interrupted(*arguments, **keywords):
        seen.append(words(pipeline).detach().clone())
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.text_encoder, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(pipeline, embeddings())
    assert (seen[0] != before).any(1).sum() == 1
    assert torch.equal(words(pipeline), before)


def test_in_half_precision(pipeline):
    pipeline.to(torch.bfloat16)
    try:
        latents = make(pipeline, embeddings())
    finally:
        pipeline.to(torch.float32)
    assert latents.dtype == torch.float32
    assert latents.isfinite().all()


def test_a_pipeline_by_name(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    torch.testing.assert_close(make(tmp_path, embeddings()), make(pipeline, embeddings()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(make(str(tmp_path), count=1), make(pipeline, count=1), rtol=1e-4, atol=1e-5)


def test_embeddings_of_another_size(pipeline):
    with pytest.raises(ValueError, match=r"outliers of oak tree: expected \[m, 16\], got \[2, 5\]"):
        make(pipeline, [torch.ones(1, 16), torch.ones(2, 5), torch.ones(1, 16)])
    with pytest.raises(ValueError, match="class_names: expected words, got ' '"):
        make(pipeline, names=["cat", " "])


@pytest.mark.parametrize("missing", ["diffusers", "transformers"])
def test_without_diffusers(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install 'oodkern\[synthesis\]'"):
        make("some/pipeline")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"count": 0}, ValueError, "count: expected 1 or more, got 0"),
        ({"steps": 0}, ValueError, "steps: expected 1 or more, got 0"),
        ({"batch": 1.5}, TypeError, "batch: expected an integer, got float"),
        ({"guidance": -1}, ValueError, "guidance: expected a finite number that is not negative"),
        ({"generator": 1}, TypeError, "generator: expected a torch.Generator, got int"),
        ({"class_names": "cat"}, ValueError, "class_names: expected names of one class or more, got 'cat'"),
        ({"class_names": []}, ValueError, "class_names: expected names of one class or more"),
        ({"prompt": "a cat"}, ValueError, "prompt: expected a text with {} for the name"),
        ({"outliers": {"cat": torch.ones(1, 2)}}, ValueError, "outliers: .* got none of oak tree, dog"),
        (
            {"outliers": torch.ones(3, 2)},
            TypeError,
            "outliers: expected a tensor a class, a list or by name, got Tensor",
        ),
        ({"outliers": [torch.ones(1, 2)]}, ValueError, "outliers: expected 3 tensors, one a class, got 1"),
        ({"outliers": [torch.ones(2)] * 3}, ValueError, r"outliers of cat: expected \[m, d_text\], got \[2\]"),
        ({"outliers": [torch.ones(0, 2)] * 3}, ValueError, "outliers of cat: expected one or more, got none"),
    ],
)
def test_arguments_are_checked(change, error, message):
    arguments = {"class_names": NAMES, "outliers": None, "count": 2, "generator": torch.Generator()} | change
    with pytest.raises(error, match=message):
        diffusion_latents("no/such/pipeline", **arguments)
