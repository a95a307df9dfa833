"""The data module: whole data sets as tensors in memory, batches by index, augmentation on the training device."""

import functools
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from mnist_lit.data.augment import Augment
from mnist_lit.data.datasets import NUM_TRAINING, DatasetName, Split, load, prepare, stratified_split
from mnist_lit.command_line import DATA_DIR_VARIABLE
from mnist_lit.errors import UsageError
from mnist_lit.training.checkpoints import find_checkpoint

if TYPE_CHECKING:
    from mnist_lit.data.image_files import Photograph

__all__ = ["MNISTDataModule", "preprocess"]

Batch = tuple[Tensor, Tensor]

NEEDED_SPLIT: dict[str, Split] = {
    "fit": "train",
    "validate": "train",
    "test": "test",
    "predict": "test",
    "export": "test",
}


class MNISTDataModule(LightningDataModule):
    """MNIST and data sets of the same shape, held in memory.

    Batches are uint8 images of shape (n, 1, 28, 28) with labels of shape (n,); on the training device they become
    float32 in [0, 1], are resized to `image_size` and, in training, augmented.

    Args:
        data_dir: Folder of the data sets, laid out like torchvision's; default `$MNIST_LIT_DATA`, else `data`.
        dataset: Which data set; `digits` is bundled with scikit-learn and needs no download.
        batch_size: Images in a training batch, 1 or more (on each device).
        eval_batch_size: Images in a validation, test or prediction batch, 1 or more (on each device).
        val_size: Images of the training set, 0 or more, that are held out for validation: a stratified choice that
            is the same for every seed. 0 trains on all of them.
        image_size: Side, in pixels, to which the 28x28 images are resized.
        augment: Random changes of the training images.
        num_workers: Processes that gather batches, 0 or more. The data is in memory: 0 is the fastest.
        pin_memory: Whether batches are gathered in memory from which a GPU copies faster.
        resident: Whether the whole data set lies on the training device, where it fits; needs `num_workers: 0`.
        download: Whether missing or damaged files are downloaded; each is verified by checksum.
        mirrors: URLs of folders to download from, tried in this order; default those of the data set.
        timeout: Seconds without an answer, above 0, after which the next mirror is tried.
        predict_paths: What `predict` reads instead of the test split: image files, folders of them, or patterns in
            quotes (`'photos/*.jpg'`), each image with one digit of any size, place and colour.

    Raises:
        UsageError: If `resident` and `num_workers` exclude each other, or if `val_size` leaves nothing.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        dataset: DatasetName = "mnist",
        batch_size: PositiveInt = 128,
        eval_batch_size: PositiveInt = 500,
        val_size: NonNegativeInt = 5000,
        image_size: PositiveInt = 28,
        augment: Augment = Augment(),
        num_workers: NonNegativeInt = 0,
        pin_memory: bool = False,
        resident: bool = False,
        download: bool = True,
        mirrors: list[str] | None = None,
        timeout: PositiveFloat = 30.0,
        predict_paths: list[str] | str | None = None,
    ) -> None:
        super().__init__()
        if resident and num_workers:
            raise UsageError("data.resident and data.num_workers exclude each other\nuse --data.num_workers 0")
        if val_size >= NUM_TRAINING[dataset]:
            raise UsageError(
                f"data.val_size {val_size} leaves none of the {NUM_TRAINING[dataset]} images of {dataset} to train on\n"
                f"use less, for example --data.val_size {NUM_TRAINING[dataset] // 6}"
            )
        self.data_dir = Path(data_dir or os.environ.get(DATA_DIR_VARIABLE, "data"))
        self.dataset = dataset
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_size = val_size
        self.image_size = image_size
        self.augment = augment
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.resident = resident
        self.download = download
        self.mirrors = mirrors
        self.timeout = timeout
        self.predict_paths = [predict_paths] if isinstance(predict_paths, str) else predict_paths
        self.photographs: list[Photograph] = []
        self.seed = torch.initial_seed() % 2**31
        self.statistics: tuple[float, float] | None = None
        self.splits: dict[str, ImageDataset] = {}
        self.resume_from: Mapping[str, int | None] = {}

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """As Lightning's, from a checkpoint of plain data (a file, a URL or a run directory) only."""
        file = find_checkpoint(str(checkpoint_path)).file
        assert file is not None
        return super().load_from_checkpoint(file, *args, **{**kwargs, "weights_only": True})

    def prepare_data(self) -> None:
        stage = self.trainer.state.fn if self.trainer else None
        self.fetch(*([stage] if stage else NEEDED_SPLIT))

    def fetch(self, *stages: str) -> None:
        """Make sure that the files which these stages need are there: training never asks for the test set."""
        if self.predict_paths is not None and "predict" in stages:
            from mnist_lit.data.image_files import find_files

            find_files(self.predict_paths)
            stages = tuple(stage for stage in stages if stage != "predict")
        splits = {NEEDED_SPLIT[stage] for stage in stages}
        prepare(self.dataset, self.data_dir, splits, mirrors=self.mirrors, download=self.download, timeout=self.timeout)

    def setup(self, stage: str) -> None:
        if stage in ("fit", "validate") and "train" not in self.splits:
            self._setup_training()
        if stage == "predict" and self.predict_paths is not None:
            self._setup_photographs(self.predict_paths)
        elif stage in ("test", "predict") and "test" not in self.splits:
            self.splits["test"] = self._place(ImageDataset(*load(self.dataset, self.data_dir, "test")))

    def _setup_training(self) -> None:
        train, val, self.statistics = _training_data(self.dataset, self.data_dir.resolve(), self.val_size)
        # All processes of a run must shuffle alike, also when none was given a seed.
        self.seed = self.trainer.strategy.broadcast(self.seed)  # type: ignore[union-attr]
        self.splits["train"] = self._place(train)
        self.splits["val"] = self._place(val)

    def _setup_photographs(self, paths: Sequence[str]) -> None:
        from mnist_lit.data.image_files import find_files, read_photographs  # image libraries

        self.photographs = read_photographs(find_files(paths))
        digits = [torch.from_numpy(one.digit) for one in self.photographs if one.digit is not None]
        images = torch.stack(digits) if digits else torch.empty(0, 28, 28, dtype=torch.uint8)
        unknown = torch.full((len(images),), -1)
        self.splits["photographs"] = self._place(ImageDataset(images, unknown))

    def _place(self, dataset: "ImageDataset") -> "ImageDataset":
        return dataset.to(self.trainer.strategy.root_device) if self.resident else dataset  # type: ignore[union-attr]

    def train_dataloader(self) -> DataLoader[Batch]:
        dataset = self.splits["train"]
        world_size, rank = self._world()
        sampler: Sampler[int] = DistributedSampler(
            dataset, num_replicas=world_size, rank=rank, seed=self.seed, drop_last=True
        )
        # Normalisation over a batch has no value for a single image, should just one be left over.
        drop_last = len(dataset) // world_size % self.batch_size == 1
        loader = self._loader(dataset, sampler=sampler, batch_size=self.batch_size, drop_last=drop_last)
        loader.load_state_dict(self.resume_from)
        return loader

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        return self._eval_loader("val") if self.val_size else []

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self._eval_loader("photographs" if self.predict_paths else "test")

    def _eval_loader(self, split: str) -> DataLoader[Batch]:
        dataset = self.splits[split]
        return self._loader(dataset, batch_sampler=Shares(len(dataset), self.eval_batch_size, *self._world()))

    def _loader(self, dataset: "ImageDataset", **kwargs: Any) -> "ResumableLoader":
        return ResumableLoader(
            dataset,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            collate_fn=_as_it_is,
            **kwargs,
        )

    def _world(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.world_size, trainer.global_rank) if trainer else (1, 0)

    # Lightning would restore the loader itself, but not one that it made before it read the checkpoint, as it does to
    # count the steps of a schedule.
    def state_dict(self) -> dict[str, int | None]:
        loader = self.trainer.train_dataloader if self.trainer else None
        return loader.state_dict() if isinstance(loader, ResumableLoader) else {}

    def load_state_dict(self, state_dict: Mapping[str, int | None]) -> None:
        self.resume_from = state_dict

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        images, labels = batch
        images = preprocess(images, self.image_size)
        if self.trainer is not None and self.trainer.training:
            images = self._augment(images)
        return images, labels

    def _augment(self, images: Tensor) -> Tensor:
        trainer = self.trainer
        assert trainer is not None
        # Keyed by the batch's place in the run instead of drawn from one stream: a resumed run needs no more than
        # that to see the same images and to drop the same features.
        place = (self.seed, trainer.current_epoch, trainer.fit_loop.batch_idx + 1, trainer.global_rank)
        for_augment, for_model = np.random.SeedSequence(place).generate_state(2, np.uint64).tolist()
        # Not torch.manual_seed: without a GPU that takes and keeps a stack trace at each call, for the GPU's sake.
        torch.default_generator.manual_seed(for_model)
        if images.is_cuda:
            torch.cuda.manual_seed(for_model)
        return self.augment(images, torch.Generator(images.device).manual_seed(for_augment))


def preprocess(images: Tensor, image_size: int) -> Tensor:
    """Bring images into the form that a network takes.

    Args:
        images: uint8, shape (n, 1, 28, 28).
        image_size: Side to which they are resized, in pixels.

    Returns:
        float32 in [0, 1], shape (n, 1, image_size, image_size).
    """
    images = images.float() / 255
    if images.shape[-1] == image_size:
        return images
    return F.interpolate(images, (image_size, image_size), mode="bilinear", antialias=True)


class ImageDataset(Dataset[Batch]):
    """Images and labels (or the part of them named by `indices`) that hands out whole batches.

    Args:
        images: uint8, shape (n, h, w).
        labels: int64, shape (n,).
        indices: Which of them, in which order; default all.
    """

    def __init__(self, images: Tensor, labels: Tensor, indices: Tensor | None = None) -> None:
        self.images = images
        self.labels = labels
        self.indices = torch.arange(len(labels)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = self.indices[torch.tensor(indices, dtype=torch.long, device=self.indices.device)]
        return self.images[chosen].unsqueeze(1), self.labels[chosen]

    def to(self, device: torch.device) -> "ImageDataset":
        return ImageDataset(self.images.to(device), self.labels.to(device), self.indices.to(device))


class Shares(Sampler[list[int]]):
    """Batches of one of several processes: together they have each image once, and each has as many batches.

    One that has no image for its last batch has an empty one; without it the others would wait for it for ever.

    Args:
        num_images: Images in all.
        batch_size: Images in a batch of one process.
        world_size: Processes.
        rank: Which of them this is, from 0.
    """

    def __init__(self, num_images: int, batch_size: int, world_size: int, rank: int) -> None:
        self.share = range(rank, num_images, world_size)
        self.starts = range(0, -(-num_images // world_size), batch_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(self.share[start : start + self.batch_size]) for start in self.starts)


class ResumableLoader(DataLoader[Batch]):
    """A DataLoader that goes on in the middle of an epoch, after the last batch that a checkpoint has seen."""

    epoch: int | None = None
    num_seen = 0
    resume_from: Mapping[str, int | None] = {}

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator: the order of an epoch is drawn at its first batch, when the sampler has been told the epoch.
        self.epoch = getattr(self.sampler, "epoch", None)
        state, self.resume_from = self.resume_from, {}
        is_resumed = self.epoch is not None and state.get("epoch") == self.epoch
        self.num_seen = (is_resumed and state.get("num_seen")) or 0
        for batch in itertools.islice(super().__iter__(), self.num_seen, None):
            self.num_seen += 1
            yield batch

    def state_dict(self) -> dict[str, int | None]:
        return {"epoch": self.epoch, "num_seen": self.num_seen}

    def load_state_dict(self, state_dict: Mapping[str, int | None]) -> None:
        self.resume_from = state_dict


def _as_it_is(batch: Any) -> Any:
    return batch


@functools.lru_cache(maxsize=1)  # a search trains many times on the same data
def _training_data(
    dataset: DatasetName, data_dir: Path, val_size: int
) -> tuple[ImageDataset, ImageDataset, tuple[float, float]]:
    """Training and validation split, and the mean and deviation of the former's pixels."""
    images, labels = load(dataset, data_dir, "train")
    train, val = (ImageDataset(images, labels, indices) for indices in stratified_split(labels, val_size))
    return train, val, _mean_and_std(images, train.indices)


def _mean_and_std(images: Tensor, indices: Tensor) -> tuple[float, float]:
    """Of the pixels in [0, 1]; in parts, which needs no copy of all images in floating point."""
    total = total_of_squares = 0.0
    for chunk in torch.split(indices, 256):
        pixels = images[chunk].flatten(start_dim=1).float()
        # Summed image by image, where that is exact or nearly so.
        total += float(pixels.sum(dim=1).double().sum())
        total_of_squares += float(torch.linalg.vecdot(pixels, pixels).double().sum())
    num_pixels = len(indices) * images[0].numel()
    mean = total / num_pixels
    return mean / 255, math.sqrt(total_of_squares / num_pixels - mean**2) / 255
