"""What an evaluation leaves behind: files and pictures that say more than one number."""

from resnest_det.reports.detection import class_tables, write_detection_report

__all__ = ["class_tables", "write_detection_report"]
