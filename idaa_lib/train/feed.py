"""From indices to images on the device: out of a copy there, or from the host while it computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from idaa_lib.methods.base import Batch
from idaa_lib.views import send

WORKERS = 2


class Feed:
    """uint8 images (N, 3, H, W) as batches on `device`.

    They all stay on the device if they take less than half of what is free there. Else worker
    processes gather each batch on the host into pinned memory, and it is copied while the device
    computes. Which of the two is printed; what comes out is the same.

    Args:
        resident: decides instead of the size.
    """

    def __init__(self, images: Tensor, device: torch.device, resident: bool | None = None) -> None:
        self.device = device
        if resident is None:
            resident = images.device == device or _fits(images, device)
        self.images = images.to(device) if resident else images
        self._order: _Order | None = None
        if not resident:
            self._order = _Order()
            self._loader = DataLoader(
                _Gathered(images),
                batch_size=None,
                sampler=self._order,
                num_workers=WORKERS,
                persistent_workers=True,
                pin_memory=device.type == "cuda",
            )

    def __call__(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        """Named indices, and the images that they name, both on the device."""
        if self._order is None:
            for batch in batches:
                here = {key: send(index, self.device) for key, index in batch.items()}
                yield here, {key: self.images[index] for key, index in here.items()}
            return
        self._order.batches = batches
        for pair in self._loader:
            batch, images = (
                {key: t.to(self.device, non_blocking=True) for key, t in part.items()}
                for part in pair
            )
            yield batch, images


class _Gathered(Dataset):
    """A batch's indices → the indices and their images. One item is a whole batch: gathering one
    image at a time would cost more than the copy."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __getitem__(self, batch: Batch) -> tuple[Batch, dict[str, Tensor]]:
        return batch, {key: self.images[index] for key, index in batch.items()}


class _Order:
    """A sampler whose batches are another epoch's each time, so that workers outlive an epoch."""

    batches: Iterable[Batch] = ()

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def _fits(images: Tensor, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    fits = images.numel() < free // 2
    where = f"stay on the {device}" if fits else "come from the host, through pinned memory"
    print(f"{images.numel() / 2**20:,.0f} MiB of images {where}.")
    return fits
