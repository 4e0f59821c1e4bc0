"""Autoencoders: pixels [B, 3, fH, fW] in [-1, 1] <-> latents [B, C, H, W] of about unit variance."""
import torch
import torch.nn.functional as F


class PixelAE:
    """The autoencoder of the tiny preset, which loses nothing: each factor x factor block of pixels becomes one latent
    position of 3 * factor^2 channels, times 2 (photographs have a standard deviation of about 0.5)."""

    def __init__(self, factor):
        self.factor, self.channels = factor, 3 * factor**2

    def encode(self, pixels):
        """[B, 3, fH, fW] -> [B, 3f^2, H, W]. The sides must be multiples of factor: see pad_to_multiple."""
        return F.pixel_unshuffle(pixels, self.factor) * 2

    def decode(self, latents):
        """[B, 3f^2, H, W] -> [B, 3, fH, fW]."""
        return F.pixel_shuffle(latents / 2, self.factor)


def pad_to_multiple(pixels, multiple):
    """Extend [B, C, H, W] right and down by mirroring (without repeating the edge, again and again if the image is
    smaller than the padding) to sides that are multiples. Crop with [..., :H, :W] to undo."""
    for dim in (2, 3):
        n = pixels.shape[dim]
        mirror = torch.arange(-(-n // multiple) * multiple, device=pixels.device) % max(1, 2 * (n - 1))
        pixels = pixels.index_select(dim, torch.where(mirror < n, mirror, 2 * (n - 1) - mirror))
    return pixels
