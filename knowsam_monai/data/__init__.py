"""Data: lists of patients, reading and checking, slices, the phantom, and the two-stream loader."""

from __future__ import annotations

from knowsam_monai.data.acdc import (
    ACDC_LABELED_SLICES,
    ACDC_TEST_PATIENTS,
    ACDC_TRAINING_PATIENTS,
    ACDC_VALIDATION_PATIENTS,
    acdc_datalist,
)
from knowsam_monai.data.datalist import load_datalist
from knowsam_monai.data.loader import SemiSupervisedLoader
from knowsam_monai.data.phantom import phantom_datalist, write_phantom
from knowsam_monai.data.readers import H5Reader, LoadCased
from knowsam_monai.data.slices import slice_dataset
from knowsam_monai.data.transforms import CheckDatad, ScaleVolumed, SplitSlicesd

__all__ = [
    "ACDC_LABELED_SLICES",
    "ACDC_TEST_PATIENTS",
    "ACDC_TRAINING_PATIENTS",
    "ACDC_VALIDATION_PATIENTS",
    "CheckDatad",
    "H5Reader",
    "LoadCased",
    "ScaleVolumed",
    "SemiSupervisedLoader",
    "SplitSlicesd",
    "acdc_datalist",
    "load_datalist",
    "phantom_datalist",
    "slice_dataset",
    "write_phantom",
]
