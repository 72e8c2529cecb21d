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
        if resident is None:
            resident = images.device == device or _fits(images, device)
        self.images = images.to(device) if resident else images
        self.device, self.resident = device, resident

    def __call__(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        """Named indices, and the images that they name, both on the device."""
        if self.resident:
            for batch in batches:
                here = {key: send(index, self.device) for key, index in batch.items()}
                yield here, {key: self.images[index] for key, index in here.items()}
            return
        loader = DataLoader(
            _Gathered(self.images),
            batch_size=None,  # an item is a whole batch: one image at a time costs more than a copy
            sampler=batches,
            num_workers=WORKERS,
            pin_memory=self.device.type == "cuda",
        )
        for pair in loader:
            batch, images = (
                {key: t.to(self.device, non_blocking=True) for key, t in part.items()}
                for part in pair
            )
            yield batch, images


class _Gathered(Dataset):
    """A batch's indices → the indices and their images."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __getitem__(self, batch: Batch) -> tuple[Batch, dict[str, Tensor]]:
        return batch, {key: self.images[index] for key, index in batch.items()}


def _fits(images: Tensor, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    fits = images.numel() < free // 2
    where = f"stay on the {device}" if fits else "come from the host, through pinned memory"
    print(f"{images.numel() / 2**20:,.0f} MiB of images {where}.")
    return fits
