"""From indices to images on the device: out of a copy there, or from the host while it computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from idaa_lib.data.streamed import Images, Photographs, count_cores
from idaa_lib.methods.base import Batch
from idaa_lib.runs import RunError
from idaa_lib.views import send

WORKERS = 2


class Feed(Dataset):
    """uint8 images (N, 3, H, W) as batches on `device`.

    They all stay on the device if they take less than half of what is free there. Else worker
    processes gather each batch on the host into pinned memory, and it is copied while the device
    computes. Which of the two is printed; what comes out is the same. Streamed photographs are
    decoded and cut in workers, as many as there are cores for this process.

    Args:
        resident: decides instead of the size.
    """

    def __init__(
        self, images: Tensor | Images, device: torch.device, resident: bool | None = None
    ) -> None:
        self.streamed = isinstance(images, Photographs)
        if resident is None:
            here = device.type != "cuda" or getattr(images, "device", None) == device
            resident = not self.streamed and (here or _fits(images, device))
        moves = resident and device.type != "cpu"
        self.images: Any = images.to(device) if moves else images
        self.device, self.resident = device, resident

    def __call__(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        """Named indices, and the images that they name, both on the device.

        A batch of streamed photographs also has what is cut of them for view i, `cut i` (B, 6): the
        size of the original, and the box. Its images are then those crops, `view i`.

        Raises RunError where a photograph is not as it was.
        """
        if self.resident:
            for batch in batches:
                here = {key: send(index, self.device) for key, index in batch.items()}
                source = batch if isinstance(self.images, Images) else here
                yield here, {key: self.images[index] for key, index in source.items()}
            return
        loader = DataLoader(
            self,
            batch_size=None,  # an item is a whole batch: one image at a time costs more than a copy
            sampler=batches,
            num_workers=count_cores() if self.streamed else WORKERS,
            pin_memory=self.device.type == "cuda",
        )
        for pair in loader:
            if isinstance(pair, OSError):  # raised in a worker, it would carry that one's trace
                raise RunError(f"{pair}. What was saved is intact.") from pair
            batch, images = (
                {key: t.to(self.device, non_blocking=True) for key, t in part.items()}
                for part in pair
            )
            yield batch, images

    def __getitem__(self, batch: Batch) -> Any:
        """What a worker makes of a batch's indices: them and their images, or an error."""
        if not self.streamed:
            return batch, {key: self.images[index] for key, index in batch.items()}
        cuts = {name: cut for name, cut in batch.items() if name.startswith("cut ")}
        boxes = torch.stack([cut[:, 2:] for cut in cuts.values()])
        try:  # an original is decoded once for all its views
            crops = self.images.gather(batch["images"], boxes, self.images.size)
        except OSError as error:
            return error
        views = (name.replace("cut", "view") for name in cuts)
        return batch, dict(zip(views, crops, strict=True))


def _fits(images: Tensor | Images, device: torch.device) -> bool:
    free, _ = torch.cuda.mem_get_info(device)
    size = images.shape.numel()
    fits = size < free // 2
    where = f"stay on the {device}" if fits else "come from the host, through pinned memory"
    print(f"{size / 2**20:,.0f} MiB of images {where}.")
    return fits
