"""Batches: an image data set in memory, the order of an epoch, and equal shares for several processes."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

__all__ = ["Batch", "DistributedEvalBatchSampler", "EpochSampler", "ImageDataset", "LazyLoader"]

Batch = tuple[Tensor, Tensor]


class ImageDataset(Dataset[Batch]):
    """Hold uint8 images, of shape (n, h, w) or (n, c, h, w), with labels, and gather whole batches by index."""

    def __init__(self, images: Tensor, labels: Tensor, indices: Tensor | None = None) -> None:
        self.images = images
        self.labels = labels
        self.indices = torch.arange(len(labels)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Gather images of shape (n, c, h, w) and their labels; the data loader calls this once per batch."""
        chosen = self.indices[torch.tensor(indices, dtype=torch.long, device=self.indices.device)]
        images = self.images[chosen]
        return images if images.ndim == 4 else images.unsqueeze(1), self.labels[chosen]

    def to(self, device: torch.device) -> "ImageDataset":
        return ImageDataset(self.images.to(device), self.labels.to(device), self.indices.to(device))


class EpochSampler(DistributedSampler[Batch]):
    """Draw the order of an epoch from seed and epoch, and begin after the batches that were trained on.

    Lightning counts epochs and batches, and has both in its checkpoints: a resumed run needs no other state.
    """

    def __init__(self, dataset: ImageDataset, batch_size: int, seed: int, trainer: Trainer) -> None:
        super().__init__(dataset, trainer.world_size, trainer.global_rank, seed=seed, drop_last=True)
        self.batch_size = batch_size
        self.trainer = trainer

    def __iter__(self) -> Iterator[Any]:
        # After a fit the counter still has the batches of the last epoch.
        num_batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready if self.trainer.training else 0
        return itertools.islice(super().__iter__(), num_batches * self.batch_size, None)


class DistributedEvalBatchSampler(Sampler[list[int]]):
    """Share images among processes so that each image is evaluated exactly once.

    All processes get equally many batches, as each waits for the others; the last batch of some may be empty.
    """

    def __init__(self, num_images: int, batch_size: int, world_size: int, rank: int) -> None:
        self.indices = range(rank, num_images, world_size)
        self.starts = range(0, -(-num_images // world_size), batch_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(self.indices[start : start + self.batch_size]) for start in self.starts)


class LazyLoader(DataLoader[Batch]):
    """Load batches from the first request on: Lightning asks for the iterator before it has set the epoch."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        yield from super().__iter__()

    # With these two methods Lightning takes the loader for resumable.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        pass
