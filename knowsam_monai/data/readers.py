"""Reading image files: h5 files, and one sentence that names a file which cannot be read."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.data import NumpyReader, PILReader
from monai.data.utils import is_supported_format
from monai.transforms import LoadImage, MapTransform
from monai.utils import ensure_tuple

from knowsam_monai.data.simpleitk_reader import SimpleITKReader

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
        ValueError: if the file is no whole h5 file or has no such dataset.

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
            raise ValueError(f"`data` must be slices of one shape (H, W) but has shapes {shapes}.")
        return np.stack(arrays, axis=-1)

    def get_data(self, img: np.ndarray) -> tuple[np.ndarray, dict]:
        array, meta = super().get_data(img)
        return array, {**meta, "affine": np.eye(4), "original_affine": np.eye(4), "spacing_known": False}

    def _read_file(self, name: str) -> np.ndarray:
        try:
            import h5py
        except ImportError as error:
            raise ImportError("`h5py` must be installed to read h5 files but is not. Run pip install h5py.") from error
        try:
            with h5py.File(name, "r") as file:
                if self.dataset in file:
                    return np.asarray(file[self.dataset])
                found = sorted(file)
        except OSError as error:
            raise ValueError(f"`data` must be a whole h5 file but {name} is not ({error}).") from error
        raise ValueError(f"`dataset` must be in {name} but is {self.dataset!r}; the file has {found}.")


class LoadCased(MapTransform):
    """Load the image files of a case, whatever `LoadImage` reads plus .h5 and .nrrd, and name one that cannot be read.

    In an h5 file the dataset called like the key is read, NRRD files by `SimpleITKReader`. Everything else is MONAI's
    `LoadImage`, which picks its reader by the file's suffix.

    Args:
        keys: keys whose values are paths (a list of paths: the channels of one image).
        slice_axis: see `H5Reader`.
        allow_missing_keys: skip keys that an item does not have: unlabelled items have no label.
        kwargs: further arguments of `LoadImage`.

    Raises:
        ValueError: if a file is missing, corrupt or of an unknown format; it names the file.

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
            # by its content: PIL would give a .png that is PostScript to an interpreter
            self.loaders[key].register(PILReader(formats=("PNG", "JPEG", "BMP")))
            self.loaders[key].register(SimpleITKReader())
            self.loaders[key].register(H5Reader(dataset=str(key), slice_axis=slice_axis))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        for key in self.key_iterator(case):
            path = case[key]
            try:
                case[key] = self.loaders[key](path)
            except Exception as error:  # every reader has its own exceptions
                raise ValueError(f"`{key}` must be a readable image but {path} is not: {_reason(error)}") from error
        return case


def _reason(error: Exception) -> str:
    """The first line of an error; NumPy's and MONAI's advise to load what could run code."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "allow_pickle" not in lines[0]:
        return lines[0]
    cause = str(error.__cause__ or error)
    if "pickle" in cause or "Object arrays" in cause:
        return "it holds no plain array; pickled Python objects are not loaded, since they could run code."
    return cause
