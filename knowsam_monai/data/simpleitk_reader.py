"""Reading NRRD and MetaImage files with SimpleITK, including their geometry."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import ImageReader
from monai.data.utils import is_supported_format, orientation_ras_lps
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple

from knowsam_monai.data.declared_size import LARGEST_RATIO, check_size, detached_files
from knowsam_monai.data.grids import check_one_grid
from knowsam_monai.errors import KnowSAMValueError


class SimpleITKReader(ImageReader):
    """Read NRRD (.nrrd, .nhdr) and MetaImage (.mha, .mhd) files for MONAI's `LoadImage`.

    MONAI's own readers of these formats need `itk` or `pynrrd`. As in MONAI's NIfTI reader, the affine maps voxel
    indices to RAS coordinates in mm:

        affine = diag(-1, -1, 1) [direction diag(spacing), origin],

    because ITK uses LPS coordinates. Axes are not reordered or flipped. The header is checked first: impossible sizes
    and data files outside its folder are refused. Axes of length 1 after the third are dropped.

    Shape:
        (x, y, z), in the file's order of axes, or (ch, x, y, z) for several values per voxel or several files.

    Raises:
        ValueError: if a file cannot be read, if it is neither 2D nor 3D, or if several files have different grids.

    Example:
        >>> from monai.transforms import LoadImage
        >>> load = LoadImage()
        >>> load.register(SimpleITKReader())
        >>> image = load("lgemri.nrrd")     # doctest: +SKIP
    """

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        return is_supported_format(filename, ["nrrd", "nhdr", "mha", "mhd"])

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> list:
        names, images = [str(name) for name in ensure_tuple(data)], []
        for name in names:
            try:
                images.append(_read_file(name))
            except (RuntimeError, OSError) as error:
                reason = " ".join(str(error).rpartition("ERROR:")[2].split())
                raise KnowSAMValueError(
                    f"`data` must be an intact image file but {name} is not ({reason}); restore it."
                ) from error
        check_one_grid({name: (image.GetSize(), _affine(image)) for name, image in zip(names, images)})
        return images

    def get_data(self, img: Sequence[Any]) -> tuple[np.ndarray, dict]:
        import SimpleITK

        images = ensure_tuple(img)
        affine = _affine(images[0])
        # SimpleITK returns (z, y, x, values).
        arrays = [SimpleITK.GetArrayFromImage(image).T for image in images]
        has_channels = images[0].GetNumberOfComponentsPerPixel() > 1
        if len(arrays) == 1:
            array = arrays[0]
        else:
            array = np.concatenate(arrays) if has_channels else np.stack(arrays)
        return array, {
            MetaKeys.AFFINE: affine,
            MetaKeys.ORIGINAL_AFFINE: affine.copy(),
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.SPATIAL_SHAPE: np.asarray(images[0].GetSize()),
            MetaKeys.ORIGINAL_CHANNEL_DIM: 0 if has_channels or len(arrays) > 1 else float("nan"),
        }


def _read_file(name: str) -> Any:
    import SimpleITK

    files = detached_files(name) or [Path(name)]
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(name)
    # set by the suffix, since ITK would choose the format by content
    reader.SetImageIO("NrrdImageIO" if name.lower().endswith(("nrrd", "nhdr")) else "MetaImageIO")
    reader.ReadImageInformation()
    size, num_values = reader.GetSize(), reader.GetNumberOfComponents()
    itemsize = SimpleITK.Image([1, 1], reader.GetPixelID(), num_values).GetSizeOfPixelComponent()
    check_size((*size, num_values), itemsize, sum(file.stat().st_size for file in files), LARGEST_RATIO)
    if any(length > 1 for length in size[3:]):
        raise KnowSAMValueError(f"`data` must be 2D or 3D but {name} has {len(size)} axes; extract a 3D image.")
    reader.SetExtractSize([*size[:3], *(0 for _ in size[3:])])
    return reader.Execute()


def _affine(image: Any) -> np.ndarray:
    dimension = image.GetDimension()
    affine = np.eye(dimension + 1)
    affine[:dimension, :dimension] = np.reshape(image.GetDirection(), (dimension, dimension)) * image.GetSpacing()
    affine[:dimension, dimension] = image.GetOrigin()
    return orientation_ras_lps(affine)
