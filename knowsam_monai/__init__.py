"""SAM-induced knowledge distillation for semi-supervised segmentation, as parts for MONAI trainers."""

__version__ = "0.1.0"
