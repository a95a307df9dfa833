"""The data module: whole data sets as tensors in memory, batches by index, augmentation on the training device."""

import functools
import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch import LightningDataModule, Trainer
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from mnist_lit.command_line import DATA_DIR_VARIABLE
from mnist_lit.data.augment import Augment
from mnist_lit.data.datasets import DATASETS, Batch, DatasetInfo, DatasetName, ImageDataset, stratified_split
from mnist_lit.data.folder import ImageFolder, find_classes
from mnist_lit.data.image_files import Candidate, ImageFile, find_files, load_image_files
from mnist_lit.errors import UsageError

# Training split, validation split, and mean and standard deviation of each channel.
TrainingData: TypeAlias = tuple[ImageDataset, ImageDataset, tuple[list[float], list[float]]]


class MNISTDataModule(LightningDataModule):
    """Hold a data set in memory; resize and augment its batches on the training device.

    Args:
        data_dir: Folder of the data sets, laid out like torchvision's; default `$MNIST_LIT_DATA`, else `data`.
        dataset: Name of the data set: `mnist`, `fashion_mnist`, `kmnist`; `digits`, which are bundled with scikit-learn
            and need no download; `folder`, images in `train/CLASS` and `test/CLASS` below `data_dir`, in two classes or
            more; or one that a project has added to `DATASETS`.
        batch_size: Images in a training batch, 1 or more (on each device).
        eval_batch_size: Images in a validation, test or prediction batch, 1 or more (on each device).
        val_size: Images of the training set, 0 or more, that are held out for validation: a stratified choice that
            is the same for every seed. 0 trains on all of them.
        test_size: Images of the training set, 0 or more, that `folder` holds out as the test set where it has none.
        image_size: Side, in pixels, to which the images are resized.
        in_channels: Channels of the images: 1 for grey levels, 3 for colours.
        class_names: Names of the classes of `folder`, in the order of the labels; default its folders.
        augment: Random changes of the training images.
        num_workers: Processes that gather batches, 0 or more. The data is in memory: 0 is the fastest.
        pin_memory: Whether batches are in pinned (page-locked) memory, for faster copies to a GPU.
        resident: Whether the whole data set is kept on the training device; needs `num_workers: 0`.
        download: Whether missing or damaged files are downloaded and verified by checksum.
        mirrors: URLs of folders to download from, tried in this order; default those of the data set.
        timeout: Seconds without an answer, above 0, after which the next mirror is tried.
        predict_paths: Images for `predict` instead of the test split: image files, folders of them, or patterns in
            quotes (`'photos/*.jpg'`), each image with one digit of any size, position and colour (of `folder`:
            anything). Of several digits the clearest large one is taken, of several pages or frames the first; a note
            says so.

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
        test_size: NonNegativeInt = 0,
        image_size: PositiveInt = 28,
        in_channels: Literal[1, 3] = 1,
        class_names: list[str] | None = None,
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
        self.data_dir = Path(data_dir or os.environ.get(DATA_DIR_VARIABLE) or "data").expanduser()
        self.dataset = str(dataset)
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
        self.in_channels = in_channels
        self.source: DatasetInfo | ImageFolder
        if dataset == "folder":
            names = tuple(class_names or find_classes(self.data_dir))
            self.source = ImageFolder(names, int(image_size), in_channels, int(test_size))
        else:
            self.source = DATASETS[dataset]
        self.class_names = self.source.class_names
        self.num_classes = len(self.class_names)
        self.image_files: list[ImageFile] = []
        self.seed = torch.initial_seed() % 2**31
        self.statistics: tuple[list[float], list[float]] | None = None  # mean and deviation of each channel
        self.splits: dict[str, ImageDataset] = {}

    def prepare_data(self) -> None:
        if self.trainer is not None and self.trainer.state.fn is not None:
            self.fetch(self.trainer.state.fn)

    def fetch(self, *stages: str) -> None:
        """Make sure that the files of these stages (`fit`, `test`, ...) are there: training needs no test files."""
        if self.predict_paths is not None and "predict" in stages:
            find_files(self.predict_paths)
            return
        splits: set[Any] = {"train" if stage in ("fit", "validate") else "test" for stage in stages}
        self.source.prepare(self.data_dir, splits, self.mirrors, self.download, self.timeout)
        if "train" in splits:
            self._training_data()

    def _training_data(self) -> TrainingData:
        data_dir = self.data_dir.resolve()
        fingerprint = self.source.fingerprint(data_dir) if isinstance(self.source, ImageFolder) else 0
        return _load_training_data(self.source, data_dir, self.val_size, self.in_channels, fingerprint)

    def setup(self, stage: str) -> None:
        if stage in ("fit", "validate") and "train" not in self.splits:
            self.splits["train"], self.splits["val"], self.statistics = self._training_data()
            if self.trainer is not None:
                # All processes of a run must shuffle alike, also if none was given a seed.
                self.seed = self.trainer.strategy.broadcast(self.seed)
        if stage == "validate" and not self.val_size:
            raise UsageError("data.val_size: 0 leaves nothing to validate on\nuse more, or the command test")
        if stage == "predict" and self.predict_paths is not None:
            self.image_files = list(load_image_files(find_files(self.predict_paths), self.convert))
            digits = [torch.from_numpy(found.digit) for file in self.image_files for found in file.candidates]
            shape = (0, self.in_channels, self.image_size, self.image_size)
            images = torch.stack(digits) if digits else torch.empty(shape, dtype=torch.uint8)
            self.splits["image_files"] = ImageDataset(images, labels=torch.full((len(images),), -1))
        elif stage in ("test", "predict") and "test" not in self.splits:
            self.splits["test"] = ImageDataset(*self.source.load(self.data_dir, "test"))
        if self.resident and self.trainer is not None:
            device = self.trainer.strategy.root_device
            self.splits = {name: split.to(device) for name, split in self.splits.items()}

    def convert(self, image: Image.Image) -> list[Candidate]:
        """Convert any picture to candidates for the network's input; none if there is no digit in it."""
        if self.source.convert is None:
            from mnist_lit.data.digits import extract_candidates  # here, as image libraries take a second

            return extract_candidates(image)
        pixels = self.source.convert(image)
        return [] if pixels is None else [Candidate(pixels)]

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        sampler = EpochSampler(self.splits["train"], self.batch_size, self.seed, self.trainer)
        # Batch normalisation fails on a single image, should just one be left over.
        drop_last = len(sampler) > 1 and len(sampler) % self.batch_size == 1
        return self._loader("train", sampler=sampler, batch_size=self.batch_size, drop_last=drop_last)

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        return self._eval_loader("val") if self.val_size else []

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        # In one process: Lightning tracks the indices of predictions, which it cannot do with batches of ours.
        return self._loader("image_files" if self.predict_paths else "test", batch_size=self.eval_batch_size)

    def _eval_loader(self, split: str) -> DataLoader[Batch]:
        """Share a split among processes so that each image is evaluated once, in equally many batches everywhere."""
        assert self.trainer is not None
        num_images, world_size, size = len(self.splits[split]), self.trainer.world_size, self.eval_batch_size
        share = range(self.trainer.global_rank, num_images, world_size)
        # Each process waits for the others: the last batch of some may be empty.
        starts = range(0, -(-num_images // world_size), size)
        return self._loader(split, batch_sampler=[list(share[start : start + size]) for start in starts])

    def _loader(self, split: str, **kwargs: Any) -> DataLoader[Batch]:
        return LazyLoader(
            self.splits[split],
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


class LazyLoader(DataLoader[Batch]):
    """Load batches from the first request on: Lightning asks for the iterator before it has set the epoch."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        yield from super().__iter__()

    # With these two methods Lightning takes the loader for resumable.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        pass


@functools.lru_cache(maxsize=1)  # a search trains many times on the same data
def _load_training_data(
    source: DatasetInfo | ImageFolder, data_dir: Path, val_size: int, in_channels: int, _fingerprint: int
) -> TrainingData:
    """Load the training and the validation split, and mean and standard deviation of each channel of the former."""
    images, labels = source.load(data_dir, "train")
    pixels = images if images.ndim == 4 else images.unsqueeze(1)
    if pixels.shape[1] != in_channels:
        raise UsageError(f"data.in_channels {in_channels}: the images have {pixels.shape[1]}\nuse that number")
    train, val = (ImageDataset(images, labels, part) for part in stratified_split(labels, val_size, "data.val_size"))
    counts = torch.zeros(in_channels, 256, dtype=torch.double)
    for indices in torch.split(train.indices, 1000):  # a copy of all would need as much memory again
        counts += torch.stack([part.flatten().bincount(minlength=256) for part in pixels[indices].unbind(dim=1)])
    shares, values = counts / counts.sum(dim=1, keepdim=True), torch.arange(256, dtype=torch.double) / 255
    mean = (shares * values).sum(dim=1, keepdim=True)
    std = (shares * (values - mean) ** 2).sum(dim=1).sqrt()
    return train, val, (mean.flatten().tolist(), std.tolist())
