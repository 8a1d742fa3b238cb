"""Writing segmentations as NIfTI with exactly the geometry of their input files."""

from __future__ import annotations

import gzip
import os
from collections.abc import Mapping
from os import PathLike
from typing import Any

from monai.data import NibabelWriter
from monai.utils import ImageMetaKey

from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.files import write_whole

GEOMETRY_FIELDS = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


class NiftiGeometryWriter(NibabelWriter):
    """Copy qform, sform, their codes, the spacing and the units from the input file's header.

    MONAI's writer stores nibabel's affine as both qform and sform. If these differ in the input, or if it has none,
    nibabel or ITK would then place input and output differently. This writer preserves both, so input and output match
    in every reader. It copies no other header fields, such as descriptions, extensions or patient names. The header's
    intent says that the file is a label map, see `is_label_map`.

    If the input is not NIfTI, or if the prediction has another grid, the output has MONAI's affine, in mm. Files are
    written completely or not at all, and never overwrite their input.

    Args:
        output_dtype: data type of the voxels, uint8 for label maps.
        kwargs: further arguments of ``NibabelWriter``.

    Raises:
        ValueError: if the output file is the input file.

    Example:
        >>> from monai.transforms import SaveImaged
        >>> save = SaveImaged("pred", writer="knowsam_monai.data.nifti_writer.NiftiGeometryWriter", resample=False)
    """

    def set_metadata(self, meta_dict: Mapping | None, resample: bool = True, **options: Any) -> None:
        self.source = (meta_dict or {}).get(ImageMetaKey.FILENAME_OR_OBJ)
        if resample:
            super().set_metadata(meta_dict, resample=resample, **options)
        else:  # MONAI's inverts the affine even then, which fails for a single sagittal or coronal slice
            self.output_dtype = self.output_dtype or self.data_obj.dtype
            self.affine = self.get_meta_info(meta_dict)[1]

    def write(self, filename: PathLike, verbose: bool = False, **obj_kwargs: Any) -> None:
        import nibabel

        files = (filename, str(self.source))
        if all(map(os.path.exists, files)) and os.path.samefile(*files):
            raise KnowSAMValueError(
                f"`filename` must not be the input file but is {filename}; set `output_postfix`, or choose another "
                "folder."
            )
        header = _nifti_header(self.source)
        image = self.create_backend_obj(self.data_obj, affine=self.affine, dtype=self.output_dtype, **obj_kwargs)
        super(NibabelWriter, self).write(filename, verbose=verbose)  # logs the file name
        array = image.dataobj
        shape = () if header is None else _same_grid(array.shape, header.get_data_shape())
        if not shape:
            image.set_qform(image.affine, code=1)
            image.set_sform(image.affine, code=1)
            image.header.set_xyzt_units("mm")
            image.header.set_intent("label")
            _save_whole(image, filename)
            return
        is_nifti_2 = isinstance(header, nibabel.Nifti2Header)
        image_class = nibabel.Nifti2Image if is_nifti_2 else nibabel.Nifti1Image
        geometry = image_class.header_class()
        geometry.set_data_dtype(array.dtype)
        geometry.set_data_shape(shape)
        for field in GEOMETRY_FIELDS:
            geometry[field] = header[field]
        geometry.set_intent("label")
        _save_whole(image_class(array.reshape(shape), None, geometry), filename)


def is_label_map(path: str | PathLike) -> bool:
    """Whether a file is NIfTI whose header declares labels (intent 1002), as those of `NiftiGeometryWriter` do.

    Example:
        >>> is_label_map("notes.txt")
        False
    """
    if not str(path).endswith((".nii", ".nii.gz")) or not os.path.isfile(path):  # a pipe would block
        return False
    try:
        header = _nifti_header(path)
        return header is not None and header.get_intent()[0] == "label"
    except Exception:  # damaged in any way; reading it as an image says how
        return False


def _save_whole(image: Any, filename: PathLike) -> None:
    content = image.to_bytes()
    content = gzip.compress(content, compresslevel=1, mtime=0) if str(filename).endswith(".gz") else content
    write_whole(filename, lambda file: file.write(content))


def _nifti_header(source: Any) -> Any:
    """The header of the file `source`; None if it is not a NIfTI file."""
    import nibabel

    try:
        header = nibabel.load(source).header
    except (OSError, TypeError, nibabel.filebasedimages.ImageFileError):
        return None
    return header if isinstance(header, nibabel.Nifti1Header) else None


def _same_grid(shape: tuple[int, ...], source_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape to write an array of `shape` in, which is the source's without channels; () if the grids differ."""
    spatial_shape = tuple(source_shape) + (1,) * (3 - len(source_shape))
    if tuple(shape) + (1,) * (3 - len(shape)) != spatial_shape[:3]:
        return ()
    has_channels = any(size > 1 for size in source_shape[3:])
    return tuple(source_shape[:3] if has_channels else source_shape)
