"""A run's folder as one HTML page: what ran, how it learned, where it is good and where not."""

from .page import write_report
from .run_folder import RunFolder, SliceImage, read_run

__all__ = ["RunFolder", "SliceImage", "read_run", "write_report"]
