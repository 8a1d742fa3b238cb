"""One HTML page about a run: what ran, how it learned, and where the student is good or bad."""

from .page import write_report
from .run_folder import RunFolder, SliceImage, read_run

__all__ = ["RunFolder", "SliceImage", "read_run", "write_report"]
