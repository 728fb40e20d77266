"""What was found in a data set: findings by stable codes, as a table, as JSON and as a page of pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from resnest_det.visualize.annotations import captioned_grid
from resnest_det.visualize.pictures import Picture

Severity = Literal["error", "warning", "info"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
NUM_EXAMPLES = 5  # that a finding keeps


class Kind(NamedTuple):
    """A kind of finding. An error stops a run or falsifies its result; a warning is likely a mistake."""

    severity: Severity
    meaning: str
    remedy: str


KINDS: dict[str, Kind] = {
    # the annotation file
    "json-broken": Kind("error", "the file is no JSON", "repair it at the place named, or write it again"),
    "json-nonstandard": Kind(
        "error", "the file is JSON for Python only", "write it in UTF-8 without NaN, Infinity or a byte order mark"
    ),
    "key-missing": Kind(
        "error", "a list of the file is missing", "a COCO instances file has images, annotations and categories"
    ),
    "image-malformed": Kind(
        "error", "an image's entry is malformed", "give it id, file_name, width and height, the sizes from 1"
    ),
    "annotation-malformed": Kind(
        "error", "an annotation is malformed", "give it id, image_id, category_id and bbox = [x, y, width, height]"
    ),
    "category-malformed": Kind("error", "a category is malformed", "give it id and name"),
    "no-images": Kind("error", "the file lists no images", "list those that are annotated"),
    "no-categories": Kind("error", "the file lists no categories", "list the classes"),
    "no-objects": Kind(
        "error", "nothing is left to train on", "annotate objects: neither crowds nor boxes that are empty or outside"
    ),
    "image-id-twice": Kind("error", "an image's id is used twice", "number the images anew, and what names them"),
    "annotation-id-twice": Kind("error", "an annotation's id is used twice", "number the annotations anew"),
    "category-id-twice": Kind("error", "a category's id is used twice", "number the categories anew"),
    "category-name-twice": Kind("warning", "two categories have one name", "make them one, or rename one"),
    "category-unused": Kind("info", "a category has no annotation in any split", "leave it out if none is to come"),
    "category-ids-have-holes": Kind("info", "category ids have holes", "nothing to do: labels are numbered anew"),
    "categories-differ": Kind("error", "the splits have other categories", "give all files the same list"),
    "annotation-without-image": Kind("error", "image_id names no image of the file", "add the image, or delete it"),
    "annotation-without-category": Kind("error", "category_id names no category", "add the category, or delete it"),
    # images
    "file-name-outside": Kind(
        "error", "file_name leaves the folder of images", "write it relative to that folder, without .."
    ),
    "image-missing": Kind("error", "a listed image is not in the folder", "add the file, or delete its entry"),
    "image-broken": Kind(
        "error", "an image cannot be decoded", "replace the file, or train with data.on_unreadable=skip"
    ),
    "image-unlisted": Kind("info", "an image of the folder is in no annotation file", "annotate it, if it is to count"),
    "image-twice": Kind("warning", "an image comes twice in a split", "keep one, with all annotations"),
    "image-without-annotations": Kind(
        "info", "an image has no annotations", "right for negatives; data.keep_empty=false leaves them out"
    ),
    "size-mismatch": Kind("error", "a file is of another size than is said", "correct the size, or the file"),
    "exif-ambiguous": Kind(
        "warning",
        "an EXIF tag turns the image, and its annotations may be of either form",
        "look at the picture; here the file is read as stored, so remove the tag or correct the boxes",
    ),
    "exif-rotated": Kind(
        "info", "an EXIF tag turns the image to the size that is said", "nothing to do: training turns it too"
    ),
    "split-leak": Kind("error", "one image is in two splits", "remove it from one: results would be too good"),
    "split-same-name": Kind(
        "info", "two splits have an image of one name", "nothing to do if they are different images"
    ),
    # boxes
    "box-not-finite": Kind("error", "bbox is not finite, or beyond ±1e9", "write four finite numbers of pixels"),
    "box-negative": Kind("error", "bbox has a negative width or height", "write x, y of the upper left corner"),
    "box-format": Kind("error", "the boxes are of another format", "write [x, y, width, height] in pixels"),
    "box-outside": Kind("warning", "a box is wholly outside its image", "correct it: training drops it"),
    "box-over-edge": Kind("warning", "a box reaches beyond its image by more than 1 px", "training clips it"),
    "box-degenerate": Kind(
        "warning", "a box is less than 1 px wide or high within its image", "delete or correct it: training drops it"
    ),
    "annotation-twice": Kind("warning", "two annotations have one image, class and box", "delete one"),
    "crowd-region": Kind("info", "crowd regions", "left out of training and ignored in evaluation"),
    # objects' masks
    "mask-missing": Kind("warning", "an annotation has no segmentation, though others have", "add it for masks"),
    "mask-malformed": Kind(
        "warning", "a segmentation is malformed", "polygons need 3 points or more, run lengths must add up"
    ),
    "mask-size": Kind("warning", "run lengths are of another size than the image", "encode the mask at that size"),
    "polygon-outside": Kind("warning", "a polygon reaches beyond its image by more than 1 px", "correct or clip it"),
    "mask-box-mismatch": Kind("warning", "bbox is not the box of the segmentation", "compute one from the other"),
    "area-mismatch": Kind(
        "warning", "area is not that of the segmentation or box", "correct it: AP by size goes by it"
    ),
    # classes and anchors
    "class-absent": Kind("warning", "a class has no objects in a split, though in another", "divide the images anew"),
    "class-imbalance": Kind(
        "info",
        "classes are of very different frequency",
        "data.repeat_threshold of a detector repeats rare ones' images, model.class_weights of a segmenter weighs "
        "their pixels",
    ),
    "anchors": Kind("info", "how the anchors fit the objects, resized as in evaluation", "see the suggestion, if any"),
    # folders of masks
    "name-twice": Kind("error", "two files differ in their suffix only", "keep one of them"),
    "image-without-mask": Kind("error", "an image has no mask", "add the mask, or remove the image"),
    "mask-without-image": Kind("error", "a mask has no image", "add the image, or remove the mask"),
    "mask-broken": Kind("error", "a mask cannot be decoded", "write it again"),
    "mask-not-index": Kind("error", "a mask is a picture of colours", "save one class index a pixel, mode L or P"),
    "too-many-classes": Kind(
        "error", "there are more classes than a mask can hold", "leave some out: a mask has 8 bits a pixel"
    ),
    "mask-values": Kind("error", "a mask holds values that are no class", "correct it, the class list or its values"),
    "mask-binary": Kind(
        "warning", "two classes seem to be saved as 0 and 255", "save them as 0 and 1: 255 is not labelled, and ignored"
    ),
    "mask-all-ignored": Kind(
        "info", "nothing is labelled in a mask", "nothing is learnt from it: label it, or remove it"
    ),
    "ignored-fraction": Kind("info", "pixels that are not labelled", "they count neither in training nor in results"),
}


class Occurrence(NamedTuple):
    """Where a finding was made: a file, an annotation's id where it is one's, and the numbers."""

    file: str
    annotation_id: int | None
    detail: str


@dataclass(frozen=True)
class Finding:
    """A kind of mistake, or of fact, in one split.

    Attributes:
        code: a key of KINDS, which stays what it is from version to version.
        severity: usually the kind's own.
        split: whose it is; of what lies between two, "train, val".
        count: how often it was found.
        examples: the first few.
        suggestion: settings to paste, or "".
    """

    code: str
    severity: Severity
    split: str
    count: int
    examples: tuple[Occurrence, ...]
    suggestion: str = ""


@dataclass(frozen=True)
class SplitSummary:
    """What a split holds: in words, and in numbers for machines."""

    description: str
    numbers: dict[str, Any]


class Drawing(Protocol):
    """An image with its annotations, drawn when it is asked for."""

    @property
    def title(self) -> str:
        """What stands above it."""
        ...

    def draw(self) -> Picture | None:
        """The picture, or None where its file cannot be read."""
        ...


@dataclass(frozen=True)
class DataReport:
    """All that was found in a data set.

    Attributes:
        splits: what each of them holds, by name.
        findings: errors first.
        drawings: images with the most findings, then others.
    """

    splits: dict[str, SplitSummary]
    findings: tuple[Finding, ...]
    drawings: tuple[Drawing, ...] = ()

    @property
    def has_errors(self) -> bool:
        """Whether any finding is an error."""
        return any(finding.severity == "error" for finding in self.findings)

    def found(self, code: str) -> list[Finding]:
        """The findings of a code, at most one a split.

        Raises:
            ValueError: there is no such code.
        """
        if code not in KINDS:
            raise ValueError(f"{code!r} is no code of a finding; they are {', '.join(KINDS)}")
        return [finding for finding in self.findings if finding.code == code]

    def table(self, *, num_examples: int = 3) -> str:
        """The splits, then a line a finding with its first examples, as text."""
        lines = [f"{name}: {summary.description}" for name, summary in self.splits.items()]
        code_width = max((len(finding.code) for finding in self.findings), default=0)
        split_width = max((len(finding.split) for finding in self.findings), default=0)
        count_width = max((len(str(finding.count)) for finding in self.findings), default=0)
        for finding in self.findings:
            kind = KINDS[finding.code]
            lines.append(
                f"\n{finding.severity:7}  {finding.code:{code_width}}  {finding.split:{split_width}}  "
                f"{finding.count:{count_width}}  {kind.meaning}; {kind.remedy}"
            )
            for example in finding.examples[:num_examples]:
                place = example.file
                if example.annotation_id is not None:
                    place += f", annotation {example.annotation_id}"
                lines.append(f"           {place}: {example.detail}" if place else f"           {example.detail}")
            if finding.suggestion:
                lines.append(f"           try: {finding.suggestion}")
        counts = []
        for severity, word in zip(SEVERITIES, ("error", "warning", "note"), strict=True):
            number = sum(finding.severity == severity for finding in self.findings)
            counts.append(f"{number} {word}{'' if number == 1 else 's'}")
        lines.append(f"\nkinds of findings: {', '.join(counts)}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the drawings, as JSON takes it."""
        return {
            "has_errors": self.has_errors,
            "splits": {
                name: {"description": summary.description} | summary.numbers for name, summary in self.splits.items()
            },
            "findings": [
                {
                    "code": finding.code,
                    "severity": finding.severity,
                    "split": finding.split,
                    "count": finding.count,
                    "meaning": KINDS[finding.code].meaning,
                    "remedy": KINDS[finding.code].remedy,
                    "examples": [example._asdict() for example in finding.examples],
                    "suggestion": finding.suggestion,
                }
                for finding in self.findings
            ],
        }

    def draw(self) -> Picture | None:
        """The page of pictures, three a row, or None where no image can be read."""
        drawn = [(picture, drawing.title) for drawing in self.drawings if (picture := drawing.draw()) is not None]
        if not drawn:
            return None
        pictures, titles = zip(*drawn, strict=True)
        return captioned_grid(pictures, titles)


class SplitFindings:
    """Takes up the findings of a split as they are made, and which images they are of.

    Args:
        split: its name.
        num_images: it has.
    """

    def __init__(self, split: str, num_images: int) -> None:
        self.split = split
        self.findings: list[Finding] = []
        self.num_findings = np.zeros(num_images, np.int64)  # errors and warnings of each image
        self._images_of: dict[str, NDArray[np.int64]] = {}  # the images of each code

    def add(
        self,
        code: str,
        count: int,
        examples: Iterable[Occurrence],
        *,
        images: NDArray[np.int64] | Sequence[int] = (),
        severity: Severity | None = None,
        suggestion: str = "",
    ) -> None:
        """Take up a finding; nothing where count is 0.

        Args:
            code: a key of KINDS.
            count: how often it was found.
            examples: at most the first few are looked at.
            images: the places of the images it was found in, as often as it was; -1 is none.
            severity: where it is not the kind's own.
            suggestion: settings to paste.
        """
        if not count:
            return
        severity = severity or KINDS[code].severity
        kept = tuple(example for example, _ in zip(examples, range(NUM_EXAMPLES), strict=False))
        self.findings.append(Finding(code, severity, self.split, count, kept, suggestion))
        if severity != "info":
            self.mark(code, images)

    def mark(self, code: str, images: NDArray[np.int64] | Sequence[int]) -> None:
        """Count a finding to images, at these places; -1 is none."""
        places = np.asarray(images, np.int64)
        places = places[places >= 0]
        np.add.at(self.num_findings, places, 1)
        self._images_of[code] = np.union1d(self._images_of.get(code, places), places)

    def codes_of(self, image: int) -> list[str]:
        """The codes of the errors and warnings of the image at that place."""
        return [code for code, places in self._images_of.items() if image in places]

    def worst_and_others(self, usable: NDArray[np.bool_], number: int) -> list[int]:
        """Images to draw: half of them those with the most findings, the rest spread over the others.

        Args:
            usable: which images can be drawn, (num_images,).
            number: of images, at most.
        """
        candidates = np.flatnonzero(usable)
        by_findings = candidates[np.argsort(-self.num_findings[candidates], kind="stable")]
        worst = by_findings[: int((self.num_findings[candidates] > 0).sum())][: (number + 1) // 2]
        others = np.setdiff1d(candidates, worst)
        spread = np.unique(np.linspace(0, len(others) - 1, min(number - len(worst), len(others))).round().astype(int))
        return [*worst.tolist(), *others[spread].tolist()]


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Findings by severity, then in the order of KINDS, then as they came."""
    codes = {code: place for place, code in enumerate(KINDS)}
    return tuple(sorted(findings, key=lambda finding: (SEVERITIES.index(finding.severity), codes[finding.code])))
