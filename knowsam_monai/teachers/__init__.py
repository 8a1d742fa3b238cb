"""Whatever can teach: the contract of a teacher, SAM 2, and a frozen network."""

from __future__ import annotations

from knowsam_monai.teachers.contract import TeacherFacts, check_teacher
from knowsam_monai.teachers.network_teacher import NetworkTeacher
from knowsam_monai.teachers.provenance import Origin, origin
from knowsam_monai.teachers.sam2_teacher import Sam2Teacher

__all__ = ["NetworkTeacher", "Origin", "Sam2Teacher", "TeacherFacts", "check_teacher", "origin"]
