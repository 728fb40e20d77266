"""What an evaluation leaves behind: files and pictures that say more than one number."""

from resnest_det.reports.detection import write_detection_report

__all__ = ["write_detection_report"]
