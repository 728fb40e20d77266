"""Data sets examined, runs reported and compared: files, pictures and pages that say more than one number."""

from resnest_det.reports.anchor_fit import Anchors
from resnest_det.reports.coco_doctor import examine_coco
from resnest_det.reports.comparison import Comparison, Experiment, Spread, compare_runs, write_comparison
from resnest_det.reports.data_doctor import DataReport, Finding, Occurrence
from resnest_det.reports.detection import class_tables, write_detection_report
from resnest_det.reports.examples import (
    Example,
    Examples,
    detection_examples,
    segmentation_examples,
    write_examples,
)
from resnest_det.reports.mask_doctor import examine_masks
from resnest_det.reports.provenance import note_end, note_evaluation, note_start
from resnest_det.reports.run_record import RunRecord, evaluation_suffixes, read_run
from resnest_det.reports.run_report import write_run_report

__all__ = [
    "Anchors",
    "Comparison",
    "DataReport",
    "Example",
    "Examples",
    "Experiment",
    "Finding",
    "Occurrence",
    "RunRecord",
    "Spread",
    "class_tables",
    "compare_runs",
    "detection_examples",
    "evaluation_suffixes",
    "examine_coco",
    "examine_masks",
    "note_end",
    "note_evaluation",
    "note_start",
    "read_run",
    "segmentation_examples",
    "write_comparison",
    "write_detection_report",
    "write_examples",
    "write_run_report",
]
