"""The data module: whole data sets as tensors in memory, batches by index, augmentation on the training device."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from mnist_lit.command_line import DATA_DIR_VARIABLE
from mnist_lit.data.augment import Augment
from mnist_lit.data.datasets import DATASETS, Split, load, stratified_split
from mnist_lit.data.loaders import Batch, DistributedEvalBatchSampler, EpochSampler, ImageDataset, LazyLoader
from mnist_lit.errors import UsageError

if TYPE_CHECKING:
    from mnist_lit.data.image_files import ImageFile

    DatasetName = str
else:
    DatasetName = Literal[tuple(DATASETS)]  # the parser checks the key against the registry

__all__ = ["MNISTDataModule", "preprocess"]


class MNISTDataModule(LightningDataModule):
    """Hold a data set in memory; resize and augment its batches on the training device.

    Args:
        data_dir: Folder of the data sets, laid out like torchvision's; default `$MNIST_LIT_DATA`, else `data`.
        dataset: Name of the data set; `digits` is bundled with scikit-learn and needs no download.
        batch_size: Images in a training batch, 1 or more (on each device).
        eval_batch_size: Images in a validation, test or prediction batch, 1 or more (on each device).
        val_size: Images of the training set, 0 or more, that are held out for validation: a stratified choice that
            is the same for every seed. 0 trains on all of them.
        image_size: Side, in pixels, to which the 28x28 images are resized.
        augment: Random changes of the training images.
        num_workers: Processes that gather batches, 0 or more. The data is in memory: 0 is the fastest.
        pin_memory: Whether batches are gathered in memory from which a GPU copies faster.
        resident: Whether the whole data set is kept on the training device; needs `num_workers: 0`.
        download: Whether missing or damaged files are downloaded; each is verified by checksum.
        mirrors: URLs of folders to download from, tried in this order; default those of the data set.
        timeout: Seconds without an answer, above 0, after which the next mirror is tried.
        predict_paths: Images for `predict` instead of the test split: image files, folders of them, or patterns in
            quotes (`'photos/*.jpg'`), each image with one digit of any size, position and colour. Of several digits
            the clearest large one is read, of several pages or frames the first; a note says so.

    Raises:
        UsageError: If `resident` and `num_workers` exclude each other.
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
        self.image_files: list[ImageFile] = []
        self.seed = torch.initial_seed() % 2**31
        self.statistics: tuple[float, float] | None = None
        self.splits: dict[str, ImageDataset] = {}

    @property
    def class_names(self) -> tuple[str, ...]:
        return DATASETS[self.dataset].class_names

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load like Lightning, but plain data only: unpickling can run any code."""
        return super().load_from_checkpoint(checkpoint_path, *args, **{**kwargs, "weights_only": True})

    def prepare_data(self) -> None:
        if self.trainer is not None and self.trainer.state.fn is not None:
            self.fetch(self.trainer.state.fn)

    def fetch(self, *stages: str) -> None:
        """Make sure that the files of these stages (`fit`, `test`, ...) are there: training needs no test files."""
        if self.predict_paths is not None and "predict" in stages:
            from mnist_lit.data.image_files import find_files  # here, as image libraries take a second

            find_files(self.predict_paths)
            stages = tuple(stage for stage in stages if stage != "predict")
        splits: set[Split] = {"train" if stage in ("fit", "validate") else "test" for stage in stages}
        DATASETS[self.dataset].prepare(self.data_dir, splits, self.mirrors, self.download, self.timeout)
        if "train" in splits:
            self._training_data()

    def setup(self, stage: str) -> None:
        if stage in ("fit", "validate") and "train" not in self.splits:
            self.splits["train"], self.splits["val"], self.statistics = self._training_data()
            if self.trainer is not None:
                # All processes of a run must shuffle alike, also if none was given a seed.
                self.seed = self.trainer.strategy.broadcast(self.seed)
        if stage == "predict" and self.predict_paths is not None:
            self.splits["image_files"] = self._load_image_files(self.predict_paths)
        elif stage in ("test", "predict") and "test" not in self.splits:
            self.splits["test"] = ImageDataset(*load(self.dataset, self.data_dir, "test"))
        if self.resident and self.trainer is not None:
            device = self.trainer.strategy.root_device
            self.splits = {name: split.to(device) for name, split in self.splits.items()}

    def _training_data(self) -> tuple[ImageDataset, ImageDataset, tuple[float, float]]:
        return _load_training_data(self.dataset, self.data_dir.resolve(), self.val_size)

    def _load_image_files(self, paths: Sequence[str]) -> ImageDataset:
        from mnist_lit.data.image_files import find_files, load_image_files

        self.image_files = load_image_files(find_files(paths))
        digits = [torch.from_numpy(candidate.digit) for file in self.image_files for candidate in file.candidates]
        images = torch.stack(digits) if digits else torch.empty(0, 28, 28, dtype=torch.uint8)
        return ImageDataset(images, labels=torch.full((len(images),), -1))

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        dataset = self.splits["train"]
        sampler = EpochSampler(dataset, self.batch_size, self.seed, self.trainer)
        # Batch normalisation fails on a single image, should just one be left over.
        drop_last = len(sampler) % self.batch_size == 1
        return self._loader(dataset, sampler=sampler, batch_size=self.batch_size, drop_last=drop_last)

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        return self._eval_loader("val") if self.val_size else []

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        # In one process: Lightning tracks the indices of predictions, which it cannot do with a batch sampler of ours.
        dataset = self.splits["image_files" if self.predict_paths else "test"]
        return self._loader(dataset, batch_size=self.eval_batch_size)

    def _eval_loader(self, split: str) -> DataLoader[Batch]:
        assert self.trainer is not None
        dataset, processes = self.splits[split], (self.trainer.world_size, self.trainer.global_rank)
        batches = DistributedEvalBatchSampler(len(dataset), self.eval_batch_size, *processes)
        return self._loader(dataset, batch_sampler=batches)

    def _loader(self, dataset: ImageDataset, **kwargs: Any) -> DataLoader[Batch]:
        return LazyLoader(
            dataset,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            collate_fn=tuple,  # the data set has gathered the batch
            **kwargs,
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        images, labels = batch
        images = preprocess(images, self.image_size)
        if self.trainer is None or not self.trainer.training:
            return images, labels
        # Seeded by the number of the batch instead of drawn from one stream: a resumed run needs no more than that to
        # see the same images and to drop the same features.
        trainer = self.trainer
        key = (self.seed, trainer.current_epoch, trainer.fit_loop.batch_idx + 1, trainer.global_rank)
        for_augment, for_model = np.random.SeedSequence(key).generate_state(2, np.uint64).tolist()
        # Not torch.manual_seed: without a GPU it takes and keeps a stack trace at each call.
        torch.default_generator.manual_seed(for_model)
        if images.is_cuda:
            torch.cuda.manual_seed(for_model)
        return self.augment(images, torch.Generator(images.device).manual_seed(for_augment)), labels


def preprocess(images: Tensor, image_size: int) -> Tensor:
    """Convert uint8 images (n, c, h, w) to a network's input: float32 in [0, 1], of `image_size` pixels a side."""
    images = images.float() / 255
    if images.shape[-1] == image_size:
        return images
    return F.interpolate(images, (image_size, image_size), mode="bilinear", antialias=True)


@functools.lru_cache(maxsize=1)  # a search trains many times on the same data
def _load_training_data(
    dataset: str, data_dir: Path, val_size: int
) -> tuple[ImageDataset, ImageDataset, tuple[float, float]]:
    """Load the training and the validation split, and the mean and standard deviation of the former."""
    images, labels = load(dataset, data_dir, "train")
    if val_size >= len(labels):
        raise UsageError(
            f"data.val_size {val_size} leaves none of the {len(labels)} images of {dataset} to train on\n"
            f"use less, for example --data.val_size {len(labels) // 6}"
        )
    train, val = (ImageDataset(images, labels, indices) for indices in stratified_split(labels, val_size))
    counts = torch.bincount(images[train.indices].flatten(), minlength=256).double()
    shares, values = counts / len(train) / images[0].numel(), torch.arange(256, dtype=torch.double) / 255
    mean = (shares * values).sum()
    return train, val, (float(mean), float((shares * (values - mean) ** 2).sum().sqrt()))
