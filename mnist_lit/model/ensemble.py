"""Average predictions over several networks, and over small changes of an image (test-time augmentation)."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_lit.data.augment import inverse_affine
from mnist_lit.errors import UsageError

TURN, SCALE, SLANT = math.radians(9), 0.09, math.tan(math.radians(8))


class Ensemble(nn.Module):
    """Average the probabilities of several networks, for images of one size and the same classes."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits of shape (n, num_classes) of images of shape (n, c, h, w) in [0, 1]."""
        return mean_probabilities(network(images) for network in self.networks)


def load_ensemble(model: LightningModule, files: Iterable[str]) -> Ensemble:
    """Load the networks of checkpoints of the same class and image size as `model`.

    Raises:
        UsageError: If one is for images of another size.
    """
    members = {file: type(model).load_from_checkpoint(file, map_location="cpu") for file in files}
    for file, member in members.items():
        for name in ("num_classes", "image_size", "in_channels"):
            if member.hparams.get(name) != model.hparams.get(name):
                raise UsageError(f"ensemble: {file} is for other data: {name} is {member.hparams.get(name)}")
    return Ensemble([member.get_submodule("network") for member in members.values()])


def mean_probabilities(logits: Iterable[Tensor]) -> Tensor:
    """Compute the logits whose softmax is the mean of the softmax of each of these."""
    logarithms = torch.stack([each.float().log_softmax(dim=-1) for each in logits])
    return logarithms.logsumexp(dim=0) - math.log(len(logarithms))


def distortions(images: Tensor) -> Iterator[Tensor]:
    """Rotate, scale, shear and shift images of shape (n, c, h, w) a little, in eight ways."""
    for turn, scale, slant in itertools.product((-1, 1), repeat=3):
        numbers = torch.tensor([[turn * TURN], [slant * SLANT], [1 + scale * SCALE]])
        matrix = inverse_affine(*numbers.to(images))
        pixels = torch.tensor([[turn * scale], [turn * slant]]).to(images)
        matrix = torch.cat([matrix, matrix @ (-2 / images.shape[-1] * pixels)], dim=2)
        grid = F.affine_grid(matrix, [1, 1, *images.shape[-2:]], align_corners=False)
        # Not len(), which would fix the size of an exported network's batches.
        yield F.grid_sample(images, grid.expand(images.shape[0], -1, -1, -1), align_corners=False).clamp(max=1)
