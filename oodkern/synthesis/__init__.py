"""Synthetic outliers, no data needed: of features at the edge of their class, or of latents of a diffusion model."""

from oodkern.synthesis.bank import read_bank, write_bank
from oodkern.synthesis.boundary import BoundaryOutliers, boundary_outliers
from oodkern.synthesis.diffusion import diffusion_latents

__all__ = ["BoundaryOutliers", "boundary_outliers", "diffusion_latents", "read_bank", "write_bank"]
