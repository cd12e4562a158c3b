"""The HR and LR images of an adaptation: those of a camera, or made of what there is."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_sr.checkpoints import NetworkSource, open_network
from lora_sr.data.degrade import degrade_folder
from lora_sr.data.sources import find_sources, read_image
from lora_sr.errors import InputError
from lora_sr.files import write_errors, write_whole
from lora_sr.images.png import encode_png
from lora_sr.runtime import Upscaler
from lora_sr.runtime.pixels import swap_channels

DEGRADED, TAUGHT = 'degraded', 'taught'


@dataclass(frozen=True)
class Images:
    """Where the images of an adaptation are.

    Attributes:
        hr: Folder of HR images; ``None`` where a teacher makes them of the LR images.
        lr: Folder of LR images of the same names; ``None`` where they are made of the HR images, as a camera would have
            taken them.
        teacher: The network that makes HR images of LR images.
    """

    hr: Path | None = None
    lr: Path | None = None
    teacher: NetworkSource | None = None

    @property
    def is_captured(self) -> bool:
        """Whether both come from cameras, so that they may lie anyhow on each other."""
        return self.hr is not None and self.lr is not None


def find_images(
    images: Images, folder: Path, scale: int, told: Callable[[str], None]
) -> tuple[Path, Path, dict[str, str]]:
    """The folders of HR and LR images; what is not there is made below ``folder``, unless that has been done.

    Returns:
        The two, and {path: why it is left out} for images of which none could be made.

    Raises:
        InputError: No image can be used, or what is made cannot be written; or the teacher has another scale.
    """
    for folder_given in (images.hr, images.lr):
        if folder_given is not None and not folder_given.is_dir():
            what = 'nothing of that name' if not folder_given.exists() else 'a file'
            raise InputError(f'Images must be in a folder, got {folder_given}, which is {what}.')
    if images.hr is not None and images.lr is not None:
        return images.hr, images.lr, {}
    if images.hr is not None:
        made = folder / DEGRADED
        told('images     making LR images as a camera might have taken them')
        degraded = degrade_folder(images.hr, made, scale, skip_broken=True, progress=False)
        return images.hr, made, degraded.left_out
    if images.lr is None or images.teacher is None:
        raise InputError('Images must be pairs, HR images, or LR images and a teacher.')
    made = folder / TAUGHT
    told('images     running the teacher')
    return made, images.lr, _teach(images.lr, images.teacher, made, scale)


def _teach(lr: Path, teacher: NetworkSource, folder: Path, scale: int) -> dict[str, str]:
    opened = open_network(teacher)
    upscaler = Upscaler(opened.network)
    if upscaler.scale != scale:
        raise InputError(f'The teacher must be a network for x{scale}, got {opened.name}, for x{upscaler.scale}.')
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    left_out = {}
    for source in find_sources([lr], scales=()):
        target = folder / f'{source.hr.stem}.png'
        if os.path.exists(target):  # whole, of an earlier call
            continue
        try:
            image = read_image(source.hr, deep=True)
        except InputError as error:
            left_out[str(source.hr)] = str(error)
            continue
        output = swap_channels(upscaler(swap_channels(image)))
        write_whole(target, encode_png(output).tobytes())
    return left_out
