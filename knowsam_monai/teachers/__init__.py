"""Teachers: SAM with adapters and learnable prompts, SAM 2, a frozen network, and 2D teachers on slices of volumes."""

from __future__ import annotations

from knowsam_monai.teachers.adapter import Adapter
from knowsam_monai.teachers.contract import TeacherFacts, check_teacher
from knowsam_monai.teachers.embedding_cache import EmbeddingCache
from knowsam_monai.teachers.intensity_window import IntensityWindow
from knowsam_monai.teachers.network_teacher import NetworkTeacher
from knowsam_monai.teachers.prompt import LearnablePrompt
from knowsam_monai.teachers.provenance import Origin, describe, origin
from knowsam_monai.teachers.sam import build_sam
from knowsam_monai.teachers.sam2_teacher import Sam2Teacher
from knowsam_monai.teachers.sam_teacher import SAMTeacher
from knowsam_monai.teachers.slice_selection import SliceSelection
from knowsam_monai.teachers.slice_teacher import SliceTeacher

__all__ = [
    "Adapter",
    "EmbeddingCache",
    "IntensityWindow",
    "LearnablePrompt",
    "NetworkTeacher",
    "Origin",
    "SAMTeacher",
    "Sam2Teacher",
    "SliceSelection",
    "SliceTeacher",
    "TeacherFacts",
    "build_sam",
    "check_teacher",
    "describe",
    "origin",
]
