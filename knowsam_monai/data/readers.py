"""Reading image files, their headers first, and one sentence that names a file which cannot be read."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Hashable, Mapping, Sequence
from os import PathLike
from typing import Any

import nibabel
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor, NibabelReader, NumpyReader, PILReader
from monai.data.utils import is_supported_format
from monai.transforms import LoadImage, MapTransform
from monai.utils import ensure_tuple

from knowsam_monai.data.declared_size import LARGEST_IMAGE, LARGEST_RATIO, check_size
from knowsam_monai.data.simpleitk_reader import SimpleITKReader
from knowsam_monai.errors import KnowSAMImportError, KnowSAMValueError

__all__ = ["H5Reader", "LoadCased"]


class H5Reader(NumpyReader):
    """Read one dataset of an h5 file as an image for MONAI's `LoadImage`.

    Several files of one 2D slice each are stacked, in their order, to one volume. An h5 pack has no spacing: the
    affine is the identity and `meta["spacing_known"]` is False, so that distances can be reported in voxels.

    Args:
        dataset: name of the dataset in the file, "image" or "label" in the usual packs.
        slice_axis: axis of a 3D dataset that counts the slices; it becomes the last one. 0 in the SSL4MIS ACDC pack
            (slices, H, W); -1 where the volume is already (H, W, slices), as in the UA-MT left-atrium pack.

    Shape:
        (H, W) or (H, W, slices), without a channel axis.

    Raises:
        ImportError: if h5py is not installed.
        ValueError: if the file is no whole h5 file or has no such dataset; if the dataset is none of numbers, keeps its
            voxels in another file, or is larger than can be meant.

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
            raise KnowSAMValueError(f"`data` must be slices of one shape (H, W) but has shapes {shapes}.")
        return np.stack(arrays, axis=-1)

    def get_data(self, img: np.ndarray) -> tuple[np.ndarray, dict]:
        array, meta = super().get_data(img)
        return array, {**meta, "affine": np.eye(4), "original_affine": np.eye(4), "spacing_known": False}

    def _read_file(self, name: str) -> np.ndarray:
        try:
            import h5py
        except ImportError as error:
            raise KnowSAMImportError(
                "`h5py` must be installed to read h5 files but is not. Run pip install h5py."
            ) from error
        try:
            with h5py.File(name, "r") as file:
                link = file.get(self.dataset, getlink=True) if self.dataset in file.keys() else None
                if isinstance(link, h5py.HardLink):
                    return self._voxels(file[self.dataset])
                found = sorted(file)
        except OSError as error:
            raise KnowSAMValueError(f"`data` must be a whole h5 file but {name} is not ({error}).") from error
        if link is not None:
            raise KnowSAMValueError(
                f"its `{self.dataset}` is a link to {link.path!r}; give files that hold their voxels."
            )
        raise KnowSAMValueError(f"`dataset` must be in {name} but is {self.dataset!r}; the file has {found}.")

    def _voxels(self, dataset: Any) -> np.ndarray:
        import h5py

        if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind not in "biuf":
            found = dataset.dtype if isinstance(dataset, h5py.Dataset) else "a group"
            raise KnowSAMValueError(f"its `{self.dataset}` must be an array of numbers but is {found}.")
        if dataset.external or dataset.is_virtual:
            raise KnowSAMValueError(
                f"its `{self.dataset}` keeps its voxels in another file; give files that hold their own."
            )
        check_size(dataset.shape, dataset.dtype.itemsize)
        array = np.asarray(dataset)
        while array.ndim > 3 and 1 in array.shape:
            array = array.squeeze(axis=array.shape.index(1))
        return array


class NiftiReader(NibabelReader):
    """Read NIfTI files for MONAI's `LoadImage`: the header first, and without axes of length 1 after the third.

    ITK writes the values of a voxel to the fifth axis, so that files of (x, y, z, 1, values) are usual.

    Raises:
        ValueError: if the voxels are no real numbers, or the header declares more of them than the file can hold, more
            than 2 GiB of them, or an affine that places none.

    Example:
        >>> from monai.transforms import LoadImage
        >>> load = LoadImage()
        >>> load.register(NiftiReader())
        >>> image = load("patient001_frame01.nii.gz")     # doctest: +SKIP
    """

    def __init__(self) -> None:
        super().__init__(squeeze_non_spatial_dims=True)

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> Any:
        for name in ensure_tuple(data):
            image = nibabel.load(name)  # the header alone, as it is: MONAI repairs some
            dtype = image.get_data_dtype()
            if dtype.kind not in "biuf":
                raise KnowSAMValueError(f"its voxels are of type {dtype}, no real numbers.")
            ratio = LARGEST_RATIO if str(name).endswith(".gz") else 1
            check_size(image.shape, dtype.itemsize, os.path.getsize(name) - image.dataobj.offset // ratio, ratio)
            _check_affine(image.affine)
        return super().read(data, **kwargs)


class ArchiveReader(NumpyReader):
    """Read .npy and .npz files for MONAI's `LoadImage`, archives that unpack to a size that can be meant.

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
                    f"its arrays take {size / 2**30:.1f} GiB and the limit is {LARGEST_IMAGE / 2**30:g} GiB."
                )
        return super().read(data, **kwargs)


class LoadCased(MapTransform):
    """Load the image files of a case, whatever `LoadImage` reads plus .h5 and .nrrd, and name one that cannot be read.

    In an h5 file the dataset called like the key is read, NRRD files by `SimpleITKReader`. Everything else is MONAI's
    `LoadImage`, which picks its reader by the file's suffix. A header that declares more than 2 GiB of voxels, or more
    than its file can hold, is refused before they are read; so is one that points at a file elsewhere.

    Args:
        keys: keys whose values are paths (a list of paths: the channels of one image).
        slice_axis: see `H5Reader`.
        allow_missing_keys: skip keys that an item does not have: unlabeled items have no label.
        kwargs: further arguments of `LoadImage`.

    Raises:
        ValueError: if a file is missing, corrupt or of an unknown format, has no voxels, or an affine that is no
            geometry; it names the file.

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
            # by its content: PIL would give a .png that is PostScript to an interpreter
            self.loaders[key].register(PILReader(formats=("PNG", "JPEG", "BMP")))
            self.loaders[key].register(SimpleITKReader())
            self.loaders[key].register(H5Reader(dataset=str(key), slice_axis=slice_axis))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        for key in self.key_iterator(case):
            path = case[key]
            try:
                for one in ensure_tuple(path):
                    _check_is_file(one)
                case[key] = _checked(self.loaders[key](path))
            except Exception as error:  # every reader has its own exceptions
                raise KnowSAMValueError(
                    f"`{key}` must be a readable image but {path} is not: {_reason(error)}"
                ) from error
        return case


def _check_is_file(path: PathLike) -> None:
    """A pipe or a device would be waited for; folders are read by those who have a reader of DICOM series."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise KnowSAMValueError("it is no file but a pipe, a socket or a device.")


def _checked(image: torch.Tensor) -> torch.Tensor:
    if image.numel() == 0:
        raise KnowSAMValueError(f"it has no voxels, its shape is {tuple(image.shape)}.")
    if isinstance(image, MetaTensor):
        _check_affine(image.affine.numpy())
    return image


def _check_affine(affine: np.ndarray) -> None:
    if not np.isfinite(affine).all() or np.linalg.det(affine) == 0:
        raise KnowSAMValueError(f"its affine {affine.tolist()} must be finite and invertible; repair its header.")


def _reason(error: Exception) -> str:
    """The first line of an error; NumPy's and MONAI's advise to load what could run code."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "allow_pickle" not in lines[0]:
        return lines[0]
    cause = str(error.__cause__ or error)
    if "pickle" in cause or "Object arrays" in cause:
        return "it holds no plain array; pickled Python objects are not loaded, since they could run code."
    return cause
