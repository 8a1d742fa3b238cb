"""Readers that check the headers of image files first, and name files that they cannot read."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Hashable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal

import nibabel
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor, NibabelReader, NumpyReader, PILReader
from monai.data.utils import is_supported_format
from monai.transforms import LoadImage, MapTransform
from monai.utils import ensure_tuple
from PIL import Image

from knowsam_monai.data.declared_size import LARGEST_IMAGE, LARGEST_RATIO, check_size
from knowsam_monai.data.grids import check_one_grid
from knowsam_monai.data.simpleitk_reader import SimpleITKReader
from knowsam_monai.errors import KnowSAMValueError


class _WithoutGeometry:
    """A reader of files that have no spacing; put it before MONAI's reader."""

    def get_data(self, img: Any) -> tuple[np.ndarray, dict]:
        array, meta = super().get_data(img)  # type: ignore[misc]
        return array, {**meta, "affine": np.eye(4), "original_affine": np.eye(4), "spacing_known": False}


class H5Reader(_WithoutGeometry, NumpyReader):
    """Read one dataset of an h5 file as an image for MONAI's `LoadImage`.

    Several files with one 2D slice each are stacked in their order. An h5 pack has no spacing, so the affine is the
    identity and `meta["spacing_known"]` is False; distances are then reported in voxels.

    Args:
        dataset: name of the dataset in the file, usually "image" or "label".
        slice_axis: slice axis of a 3D dataset, which becomes the last axis. 0 for the SSL4MIS ACDC pack (slices, H, W);
            -1 for volumes (H, W, slices), as in the UA-MT left-atrium pack.

    Shape:
        (H, W) or (H, W, slices), without a channel axis.

    Raises:
        ValueError: if the file is damaged, not an h5 file, or lacks the dataset; if the dataset does not contain
            numbers, stores its voxels in another file, or is too large.

    Example:
        >>> from monai.transforms import LoadImage
        >>> load = LoadImage()
        >>> load.register(H5Reader("image"))
        >>> image = load("patient001_frame01.h5")     # doctest: +SKIP
    """

    def __init__(self, dataset: str = "image", slice_axis: int = 0) -> None:
        super().__init__()
        self.dataset = dataset
        self.slice_axis = slice_axis

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        return is_supported_format(filename, ["h5", "hdf5"])

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs) -> np.ndarray:
        arrays = [self._read_file(str(name)) for name in ensure_tuple(data)]
        if len(arrays) == 1:
            return np.moveaxis(arrays[0], self.slice_axis, -1) if arrays[0].ndim == 3 else arrays[0]
        if any(array.ndim != 2 or array.shape != arrays[0].shape for array in arrays):
            shapes = sorted({array.shape for array in arrays})
            raise KnowSAMValueError(
                f"`data` must be slices of one shape (H, W) but their shapes are {shapes}; correct the list of files."
            )
        return np.stack(arrays, axis=-1)

    def _read_file(self, name: str) -> np.ndarray:
        import h5py

        try:
            with h5py.File(name, "r") as file:
                link = file.get(self.dataset, getlink=True) if self.dataset in file.keys() else None
                if isinstance(link, h5py.HardLink):
                    return self._voxels(file[self.dataset])
                found = sorted(file)
        except OSError as error:
            raise KnowSAMValueError(
                f"`data` must be an intact h5 file but {name} is not ({error}); restore it."
            ) from error
        if link is not None:
            raise KnowSAMValueError(
                f"its `{self.dataset}` is a link to {link.path!r}; use files that contain their voxels."
            )
        raise KnowSAMValueError(f"`dataset` must be in {name} but is {self.dataset!r}; the file has {found}.")

    def _voxels(self, dataset: Any) -> np.ndarray:
        import h5py

        if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind not in "biuf":
            found = dataset.dtype if isinstance(dataset, h5py.Dataset) else "a group"
            raise KnowSAMValueError(
                f"its `{self.dataset}` must be an array of numbers but is {found}; export it again."
            )
        if dataset.external or dataset.is_virtual:
            raise KnowSAMValueError(
                f"its `{self.dataset}` stores its voxels in another file; use files that contain their voxels."
            )
        check_size(dataset.shape, dataset.dtype.itemsize)
        array = np.asarray(dataset)
        while array.ndim > 3 and 1 in array.shape:
            array = array.squeeze(axis=array.shape.index(1))
        return array


class NiftiReader(NibabelReader):
    """Read NIfTI files for MONAI's `LoadImage`, check the header first, and drop axes of length 1 after the third.

    ITK writes several values per voxel along the fifth axis, so files of shape (x, y, z, 1, values) are common.

    Raises:
        ValueError: if the voxels are not real numbers, if the header declares more voxels than the file can contain or
            more than 2 GiB, or if the affine is not invertible.

    Example:
        >>> from monai.transforms import LoadImage
        >>> load = LoadImage()
        >>> load.register(NiftiReader())
        >>> image = load("patient001_frame01.nii.gz")     # doctest: +SKIP
    """

    def __init__(self) -> None:
        super().__init__(squeeze_non_spatial_dims=True)

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> Any:
        images = {str(name): nibabel.load(name) for name in ensure_tuple(data)}  # only headers; MONAI repairs some
        for name, image in images.items():
            dtype = image.get_data_dtype()
            if dtype.kind not in "biuf":
                raise KnowSAMValueError(f"its voxels have type {dtype}; convert them to real numbers.")
            ratio = LARGEST_RATIO if name.lower().endswith(".gz") else 1
            check_size(image.shape, dtype.itemsize, os.path.getsize(name) - image.dataobj.offset // ratio, ratio)
            _check_affine(image.affine)
        check_one_grid({name: (image.shape[:3], image.affine) for name, image in images.items()})
        return super().read(data, **kwargs)

    def get_data(self, img: Any) -> tuple[np.ndarray, dict]:
        first, *others = ensure_tuple(img)  # MONAI refuses affines that differ by rounding
        return super().get_data([first, *(type(image)(image.dataobj, first.affine, image.header) for image in others)])


class ArchiveReader(_WithoutGeometry, NumpyReader):
    """Read .npy and .npz files for MONAI's `LoadImage`, and refuse archives that are too large when unpacked.

    Axes of length 1 after the third are dropped. These files have no spacing, see `H5Reader`.

    Example:
        >>> from monai.transforms import LoadImage
        >>> load = LoadImage()
        >>> load.register(ArchiveReader())
        >>> image = load("patient001.npz")     # doctest: +SKIP
    """

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> Any:
        for name in ensure_tuple(data):
            size = os.path.getsize(name)
            if zipfile.is_zipfile(name):
                with zipfile.ZipFile(name) as archive:
                    size = sum(member.file_size for member in archive.infolist())
            if size > LARGEST_IMAGE:
                raise KnowSAMValueError(
                    f"its arrays take {size / 2**30:.1f} GiB but the limit is {LARGEST_IMAGE / 2**30:g} GiB; crop them."
                )
        return super().read(data, **kwargs)

    def get_data(self, img: Any) -> tuple[np.ndarray, dict]:
        arrays = [img] if isinstance(img, np.ndarray) else img
        arrays = [array.reshape(array.shape[:3] + tuple(n for n in array.shape[3:] if n > 1)) for array in arrays]
        return super().get_data(arrays)


class PictureReader(_WithoutGeometry, PILReader):
    """Read PNG, JPEG and BMP files for MONAI's `LoadImage`; they have no spacing, see `H5Reader`.

    Pixels are taken as stored, whatever EXIF says. `meta["is_color"]` tells whether a file has several channels.

    Args:
        palette: what the pixels of a file with a palette are. "colors": gray values if all of its colors are gray, else
            RGB; "numbers": the positions in the palette, as in label maps.

    Example:
        >>> from monai.transforms import LoadImage
        >>> load = LoadImage()
        >>> load.register(PictureReader())
        >>> image = load("polyp.png")     # doctest: +SKIP
    """

    def __init__(self, palette: Literal["colors", "numbers"] = "colors") -> None:
        converter = _without_palette if palette == "colors" else None
        super().__init__(converter, formats=("PNG", "JPEG", "BMP"))  # PIL would run PostScript in a .png file

    def get_data(self, img: Any) -> tuple[np.ndarray, dict]:
        array, meta = super().get_data(img)
        return array, {**meta, "is_color": len(ensure_tuple(img)[0].getbands()) > 1}


class LoadCased(MapTransform):
    """Load a case's image files in the formats of `LoadImage`, .h5 and .nrrd, and name files that cannot be read.

    h5 files are read by `H5Reader`, with the key as the name of the dataset, and NRRD files by `SimpleITKReader`. For
    other formats MONAI's `LoadImage` chooses the reader by suffix. Headers are checked before voxels are read: more
    than 2 GiB of voxels, more voxels than the file can contain, and data files in other folders are refused.

    Args:
        keys: keys of paths; a list of paths gives the channels of one image.
        slice_axis: see `H5Reader`.
        allow_missing_keys: whether to skip missing keys, such as the label of unlabeled items.
        kwargs: further arguments of `LoadImage`.

    Raises:
        ValueError: if a file is missing, corrupt or of unknown format, or if it has no voxels or an invalid affine; the
            message names the file. Also if the case has a reason under "left_out".

    Example:
        >>> load = LoadCased(keys=["image", "label"], allow_missing_keys=True)
        >>> case = load({"image": "patient001_frame01.nii.gz"})     # doctest: +SKIP
    """

    def __init__(
        self, keys: KeysCollection, slice_axis: int = 0, allow_missing_keys: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.loaders: dict[Hashable, LoadImage] = {}
        for key in self.keys:
            self.loaders[key] = LoadImage(image_only=True, **kwargs)
            self.loaders[key].register(NiftiReader())
            self.loaders[key].register(ArchiveReader())
            self.loaders[key].register(PictureReader("numbers" if key == "label" else "colors"))
            self.loaders[key].register(SimpleITKReader())
            self.loaders[key].register(H5Reader(dataset=str(key), slice_axis=slice_axis))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        if "left_out" in case:  # see `inference_items`
            raise KnowSAMValueError(case["left_out"])
        for key in self.key_iterator(case):
            path = case[key]
            try:
                for file in ensure_tuple(path):
                    _check_is_file(file)
                case[key] = _checked(self.loaders[key](path))
            except Exception as error:  # readers raise many kinds of errors
                raise KnowSAMValueError(
                    f"`{key}` must be a readable image but {path} is not: {_reason(error, path)}"
                ) from error
        return case


def _without_palette(picture: Image.Image) -> Image.Image:
    if picture.mode != "P":
        return picture
    rgb = picture.convert("RGB")
    red, green, blue = rgb.split()
    return red if red.tobytes() == green.tobytes() == blue.tobytes() else rgb


def _check_is_file(path: PathLike) -> None:
    """Refuse pipes and devices, whose reading would block; folders may be DICOM series."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise KnowSAMValueError("it is a pipe, a socket or a device; use a regular file.")


def _checked(image: torch.Tensor) -> torch.Tensor:
    if image.numel() == 0:
        raise KnowSAMValueError(f"it has no voxels, its shape is {tuple(image.shape)}; restore the file.")
    if isinstance(image, MetaTensor):
        _check_affine(image.affine.numpy())
    return image


def _check_affine(affine: np.ndarray) -> None:
    if not np.isfinite(affine).all() or np.linalg.det(affine) == 0:
        raise KnowSAMValueError(f"its affine {affine.tolist()} must be finite and invertible; repair its header.")


def _reason(error: Exception, path: PathLike | Sequence[PathLike]) -> str:
    """The first line of an error, without the advice of NumPy and MONAI to load code."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if any(map(os.path.isdir, ensure_tuple(path))) and "suitable reader" in lines[0]:
        return "it is a folder, whose files no reader takes for one image; convert DICOM first, such as with dcm2niix."
    if "allow_pickle" not in lines[0]:
        return lines[0]
    cause = str(error.__cause__ or error)
    if "pickle" in cause or "Object arrays" in cause:
        return "it is not a plain array; pickled Python objects are not loaded, since they could run code."
    return cause
