"""Data: lists of patients, reading and checking, slices, the phantom, and the two-stream loader."""

from __future__ import annotations

from knowsam_monai.data.acdc import (
    ACDC_LABELED_SLICES,
    ACDC_TEST_PATIENTS,
    ACDC_TRAINING_PATIENTS,
    ACDC_VALIDATION_PATIENTS,
    acdc_datalist,
)
from knowsam_monai.data.check import DatalistReport, check_datalist, check_dataset
from knowsam_monai.data.datalist import load_datalist
from knowsam_monai.data.left_atrium import (
    LEFT_ATRIUM_LABELED,
    LEFT_ATRIUM_TEST_CASES,
    LEFT_ATRIUM_TRAINING_CASES,
    LEFT_ATRIUM_VALIDATION,
    left_atrium_datalist,
)
from knowsam_monai.data.loader import SemiSupervisedLoader
from knowsam_monai.data.orientation import RandOrientationd
from knowsam_monai.data.phantom import phantom_datalist, write_phantom
from knowsam_monai.data.readers import H5Reader, LoadCased
from knowsam_monai.data.simpleitk_reader import SimpleITKReader
from knowsam_monai.data.slices import slice_dataset
from knowsam_monai.data.transforms import CheckDatad, ScaleVolumed, SplitSlicesd
from knowsam_monai.data.volume_transforms import CropCentred, OrientVolumed, PadVolumed, ResampleVolumed

__all__ = [
    "ACDC_LABELED_SLICES",
    "ACDC_TEST_PATIENTS",
    "ACDC_TRAINING_PATIENTS",
    "ACDC_VALIDATION_PATIENTS",
    "CheckDatad",
    "CropCentred",
    "DatalistReport",
    "H5Reader",
    "LEFT_ATRIUM_LABELED",
    "LEFT_ATRIUM_TEST_CASES",
    "LEFT_ATRIUM_TRAINING_CASES",
    "LEFT_ATRIUM_VALIDATION",
    "LoadCased",
    "OrientVolumed",
    "PadVolumed",
    "ResampleVolumed",
    "RandOrientationd",
    "ScaleVolumed",
    "SemiSupervisedLoader",
    "SimpleITKReader",
    "SplitSlicesd",
    "acdc_datalist",
    "check_datalist",
    "check_dataset",
    "left_atrium_datalist",
    "load_datalist",
    "phantom_datalist",
    "slice_dataset",
    "write_phantom",
]
