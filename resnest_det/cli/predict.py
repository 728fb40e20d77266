"""`resnest-det predict`: a run or checkpoint, images and videos -> pictures, and what is in them as JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from tqdm import tqdm

from resnest_det.classify import read_class_names
from resnest_det.config import DetectionSettings
from resnest_det.data.files import UnreadableImageError, read_rgb
from resnest_det.data.image_search import find_images
from resnest_det.data.mask_folder import IMAGE_SUFFIXES
from resnest_det.data.videos import VIDEO_SUFFIXES, UnreadableVideoError, VideoReader, VideoWriter
from resnest_det.predictor import Predictor
from resnest_det.visualize import class_colour, class_legend, paint_segmentation

if TYPE_CHECKING:
    from resnest_det.cli import SubParsers

T = TypeVar("T")

_SCORE_THRESHOLD = 0.5
_RESULTS = "predictions.json"
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {  # so that letters and thin lines stay sharp
    ".jpg": {"quality": 95, "subsampling": 0},
    ".jpeg": {"quality": 95, "subsampling": 0},
    ".webp": {"quality": 95},
}
_LEAST_LEGEND_WIDTH = 480  # pixels
_NUM_SHOWN = 8  # classes in the summary


@dataclass(frozen=True)
class _Job:
    """An image or video, and where what is made of it goes: paths relative to the output."""

    file: Path
    is_video: bool
    drawn: Path
    mask: Path  # of an image that is segmented
    frames: Path  # of a video: what is in each of its frames
    legend: Path  # of a video that is segmented

    @property
    def places(self) -> tuple[Path, ...]:
        """All that may be written."""
        return (self.drawn, self.frames, self.legend) if self.is_video else (self.drawn, self.mask)


def add(commands: SubParsers) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "predict",
        help="find what is in images and videos, with a run or a checkpoint",
        description="Find what is in images and videos, with a run's best checkpoint or any other one. Settings and "
        "class names come with it, and images are looked at as in the run's evaluation: at its sizes, in its tiles or "
        "windows.",
        epilog=f"DIR gets {_RESULTS}; pictures/, every image and video drawn, under the name and in the folders that "
        "it has below the folder that all of them share; masks/ of a segmentation model; frames/ of videos. What "
        "cannot be read, resized or drawn is skipped and named, and the exit status is then 1.",
    )
    parser.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT", help="a run folder, or a file of weights")
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE|FOLDER|GLOB|VIDEO",
        help="images, videos, folders, searched with their sub-folders, and patterns such as 'photos/**/*.jpg'",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="a folder that is new, or has former predictions"
    )
    parser.add_argument(
        "--score-threshold",
        type=float,
        metavar="S",
        help=f"score below which detections are left out, from 0 to 1 ({_SCORE_THRESHOLD})",
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at a time (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    parser.add_argument("--no-pictures", action="store_true", help="draw nothing")
    parser.add_argument(
        "--config", metavar="C", help="the model's settings, a .toml file or such as det/sample (the checkpoint's own)"
    )
    parser.add_argument(
        "--classes", metavar="FILE", help="class names, one a line in the order of labels (the checkpoint's own)"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    output: Path = arguments.output
    batch_size: int = arguments.batch_size
    draws = not arguments.no_pictures
    if batch_size < 1:
        raise ValueError(f"--batch-size is {batch_size}, expected at least 1")
    files = find_images(
        arguments.images,
        suffixes=(*IMAGE_SUFFIXES, *VIDEO_SUFFIXES),
        leave_out=[output / folder for folder in ("pictures", "masks", "frames")],
    )
    jobs = _plan(files, [folder for folder in map(Path, arguments.images) if folder.is_dir()])
    _check_output(output, jobs)
    predictor = Predictor.from_checkpoint(
        arguments.checkpoint,
        config=arguments.config,
        class_names=read_class_names(arguments.classes) if arguments.classes else None,
        device=arguments.device,
        score_threshold=arguments.score_threshold,
    )
    if predictor.task == "detection" and predictor.score_threshold is None:
        predictor.score_threshold = _SCORE_THRESHOLD  # what the run evaluates from is too low to look at
    print(_describe(predictor), file=sys.stderr)

    results: dict[str, Any] = {"checkpoint": arguments.checkpoint, "task": predictor.task}
    if predictor.task == "detection":
        results["score_threshold"] = predictor.score_threshold
    results |= {"class_names": predictor.class_names, "images": [], "videos": [], "skipped": []}
    with _kept_in(output / _RESULTS, results):
        images = [job for job in jobs if not job.is_video]
        # tqdm reads None as "off where stderr is no terminal".
        with tqdm(total=len(images), desc="predict", unit="image", leave=False, disable=None) as bar:
            for batch in _batches(images, batch_size):
                _predict_images(predictor, batch, output, results, draws=draws)
                bar.update(len(batch))
        for job in jobs:
            if job.is_video:
                _predict_video(predictor, job, output, results, batch_size=batch_size, draws=draws)
    for skipped in results["skipped"]:
        print(f"skipped: {skipped['reason']}", file=sys.stderr)
    print(f"{_summary(results)}\n{output / _RESULTS}{f', {output}/pictures' if draws else ''}")
    return 1 if results["skipped"] else 0


# --- where everything goes


def _plan(files: Sequence[Path], folders: Sequence[Path]) -> list[_Job]:
    """What is made of each file, under its path below the folder that all of them share.

    Args:
        files: images and videos.
        folders: those that were named: their own sub-folders are part of the paths.
    """
    # Without following links, so that names are those that were given.
    absolute = [os.path.abspath(file) for file in files]  # noqa: PTH100
    shared = os.path.commonpath([*map(os.path.abspath, folders), *map(os.path.dirname, absolute)])
    names = [Path(os.path.relpath(file, shared)) for file in absolute]
    alike = Counter(name.with_suffix("") for name in names)  # files that differ in their suffix only
    jobs = []
    for file, name in zip(files, names, strict=True):
        stem = name.with_suffix("") if alike[name.with_suffix("")] == 1 else name
        is_video = name.suffix.lower() in VIDEO_SUFFIXES
        drawn = name if name.suffix.lower() in IMAGE_SUFFIXES else Path(f"{name}.png")
        jobs.append(
            _Job(
                file=file,
                is_video=is_video,
                drawn="pictures" / (Path(f"{stem}.mp4") if is_video else drawn),
                mask="masks" / Path(f"{stem}.png"),
                frames="frames" / Path(f"{stem}.jsonl"),
                legend="frames" / Path(f"{stem}.png"),
            )
        )
    places: dict[Path, Path] = {}
    for job in jobs:
        for place in job.places:
            if place in places:
                raise ValueError(
                    f"{places[place]} and {job.file} would both be written to {place}; predict them one after the "
                    f"other, with an --output each"
                )
            places[place] = job.file
    return jobs


def _check_output(output: Path, jobs: Sequence[_Job]) -> None:
    """Refuse an output that may hold what must not be replaced."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; name a folder")
    inputs = {job.file.resolve(): job.file for job in jobs}
    for place in (Path(_RESULTS), *(place for job in jobs for place in job.places)):
        if replaced := inputs.get((output / place).resolve()):
            raise ValueError(f"--output {output} would replace the input {replaced}; name another folder")
    if output.is_dir() and any(output.iterdir()) and not (output / _RESULTS).exists():
        raise ValueError(
            f"--output {output} holds other things than predictions, which might be replaced; name a folder that is "
            f"new or empty, or has the {_RESULTS} of an earlier call"
        )


def _made(path: Path) -> Path:
    """The path, with its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# --- images


def _predict_images(
    predictor: Predictor, jobs: Sequence[_Job], output: Path, results: dict[str, Any], *, draws: bool
) -> None:
    """Predict a batch of images, write what is made of them, and note it in the results."""
    pixels: dict[_Job, NDArray[np.uint8]] = {}
    for job in jobs:
        try:
            pixels[job] = read_rgb(job.file, 0, 0)  # of no expected size, so always turned as EXIF says
            predictor.check_size(*pixels[job].shape[:2])
        except ValueError as error:
            pixels.pop(job, None)
            _skip(job, error, results)
    predictions = predictor.predict_batch(list(pixels.values()))
    for (job, image), prediction in zip(pixels.items(), predictions, strict=True):
        height, width = image.shape[:2]
        record: dict[str, Any] = {"file": str(job.file), "width": width, "height": height}
        if draws:
            picture = Image.fromarray(predictor.draw(image, prediction))
            picture.save(_made(output / job.drawn), **_SAVE_OPTIONS.get(job.drawn.suffix.lower(), {}))
            record["picture"] = job.drawn.as_posix()
        if predictor.task == "segmentation":
            _save_mask(prediction["out"], predictor, _made(output / job.mask))
            record["mask"] = job.mask.as_posix()
        results["images"].append(record | _describe_prediction(predictor, prediction))


def _skip(job: _Job, error: ValueError | OSError, results: dict[str, Any]) -> None:
    """Note a file that cannot be predicted, or a video that cannot be drawn, with a reason that names the file."""
    is_named = isinstance(error, UnreadableImageError | UnreadableVideoError)
    reason = str(error) if is_named else f"{job.file}: {error}"
    results["skipped"].append({"file": str(job.file), "reason": reason})


def _save_mask(labels: Tensor, predictor: Predictor, path: Path) -> None:
    """A label map as a PNG of one byte a pixel, the label, with a palette so that it can be looked at."""
    mask = Image.fromarray(labels.numpy().astype(np.uint8))
    colours = [(predictor.colours or {}).get(label) or class_colour(label) for label in range(256)]
    mask.putpalette([value for colour in colours for value in colour])
    mask.save(path)


def _describe_prediction(predictor: Predictor, prediction: dict[str, Tensor]) -> dict[str, Any]:
    """A prediction as JSON has it: detections, best first, or classes by the part of the image that they take."""
    names = predictor.class_names
    if predictor.task == "segmentation":
        counts = prediction["out"].unique(return_counts=True)
        found = sorted(zip(*(part.tolist() for part in counts), strict=True), key=lambda pair: (-pair[1], pair[0]))
        num_pixels = prediction["out"].numel()
        return {
            "classes": [
                {"label": label, "class_name": names[label], "share": round(count / num_pixels, 6)}
                for label, count in found
            ]
        }
    encoded = []
    if "masks" in prediction and len(prediction["masks"]):
        # pycocotools wants (H, W, N) in Fortran's order, which is (N, W, H) in ours.
        columns = prediction["masks"].to(torch.uint8).transpose(1, 2).contiguous().numpy()
        encoded = coco_mask.encode(columns.T)
    detections = []
    for place, (box, label, score) in enumerate(
        zip(*(prediction[key].tolist() for key in ("boxes", "labels", "scores")), strict=True)
    ):
        detection = {
            "label": label,
            "class_name": names[label],
            "score": round(score, 4),
            "box_xyxy": [round(side, 2) for side in box],
        }
        if encoded:
            detection["mask"] = {"size": encoded[place]["size"], "counts": encoded[place]["counts"].decode()}
        detections.append(detection)
    return {"detections": detections}


# --- videos


def _predict_video(
    predictor: Predictor, job: _Job, output: Path, results: dict[str, Any], *, batch_size: int, draws: bool
) -> None:
    """Predict a video's frames in batches, write them as they come, and note the video in the results."""
    try:
        video = VideoReader(job.file)
        predictor.check_size(*video.size)
    except ValueError as error:
        _skip(job, error, results)
        return
    areas: Counter[int] = Counter()  # of each label that is seen, for the legend
    num_frames = 0
    if draws:
        _made(output / job.drawn)
    with (
        video,
        _made(output / job.frames).open("w", encoding="utf-8") as lines,
        VideoWriter(output / job.drawn, video.frames_per_second) as drawn,
        tqdm(total=video.num_frames or None, desc=job.file.name, unit="frame", leave=False, disable=None) as bar,
    ):
        for frames in _batches(video, batch_size):
            for frame, prediction in zip(frames, predictor.predict_batch(frames), strict=True):
                when = {"frame": num_frames, "seconds": round(num_frames / video.frames_per_second, 3)}
                described = when | _describe_prediction(predictor, prediction)
                print(json.dumps(described, ensure_ascii=False), file=lines)
                if draws:
                    try:
                        drawn.write(_draw_frame(predictor, frame, prediction))
                    except OSError as error:
                        _skip(job, error, results)
                        draws = False
                for found in described.get("classes", ()):
                    areas[found["label"]] += found["share"]
                num_frames += 1
            bar.update(len(frames))
    height, width = frame.shape[:2]
    record: dict[str, Any] = {"file": str(job.file), "width": width, "height": height, "num_frames": num_frames}
    record |= {"frames_per_second": video.frames_per_second, "frames": job.frames.as_posix()}
    if draws:
        record["picture"] = job.drawn.as_posix()
    if draws and areas:
        labels = [label for label, _ in areas.most_common()]
        legend = class_legend(labels, predictor.class_names, predictor.colours, width=max(width, _LEAST_LEGEND_WIDTH))
        Image.fromarray(legend).save(output / job.legend)
        record["legend"] = job.legend.as_posix()
    results["videos"].append(record)


def _draw_frame(predictor: Predictor, frame: NDArray[np.uint8], prediction: dict[str, Tensor]) -> NDArray[np.uint8]:
    """A frame drawn at one size throughout a video: without the legend, which is as high as there are classes."""
    if predictor.task == "segmentation":
        return paint_segmentation(frame, prediction["out"], predictor.colours)
    return predictor.draw(frame, prediction)


# --- what is said of it


@contextmanager
def _kept_in(path: Path, results: dict[str, Any]) -> Iterator[None]:
    """Write the results at the start of the block, which says what the folder is, and at its end, after Ctrl-C too."""
    _made(path).write_text(_as_text(results), encoding="utf-8", errors="backslashreplace")
    try:
        yield
    finally:
        path.write_text(_as_text(results), encoding="utf-8", errors="backslashreplace")


def _as_text(results: dict[str, Any]) -> str:
    """The results as JSON, with a line for each detection or class."""
    return _indented(results, 4) + "\n"


def _indented(value: Any, levels: int, margin: str = "") -> str:
    """A value as JSON whose outer lists and dicts have a line for each item."""
    if levels == 0 or not value or not isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    inner = f"{margin}  "
    if isinstance(value, dict):
        items = [f"{json.dumps(str(key))}: {_indented(item, levels - 1, inner)}" for key, item in value.items()]
    else:
        items = [_indented(item, levels - 1, inner) for item in value]
    begin, end = "{}" if isinstance(value, dict) else "[]"
    return f"{begin}\n{inner}" + f",\n{inner}".join(items) + f"\n{margin}{end}"


def _describe(predictor: Predictor) -> str:
    """The model, in a line."""
    settings = predictor.settings
    kind = settings.model.detector if isinstance(settings, DetectionSettings) else settings.model.segmenter
    scores = f"; scores from {predictor.score_threshold:g}" if predictor.score_threshold is not None else ""
    return f"{kind} on {settings.model.backbone}, {len(predictor.class_names)} classes{scores}; {predictor.device}"


def _summary(results: dict[str, Any]) -> str:
    """How much was looked at, and what is in the images, in a line."""
    images, videos = results["images"], results["videos"]
    seen = [_counted(len(images), "image")] if images or not videos else []
    if videos:
        num_frames = sum(video["num_frames"] for video in videos)
        seen.append(f"{_counted(len(videos), 'video')} of {_counted(num_frames, 'frame')}")
    text = ", ".join(seen)
    if not images:
        return text
    amounts: Counter[str] = Counter()
    if results["task"] == "detection":
        amounts.update(found["class_name"] for image in images for found in image["detections"])
        parts = [f"{name} {count}" for name, count in amounts.most_common()]
        text += f"; {_counted(amounts.total(), 'detection')} in the images"
    else:
        for found in (found for image in images for found in image["classes"]):
            amounts[found["class_name"]] += found["share"]
        parts = [f"{name} {share / len(images):.0%}" for name, share in amounts.most_common()]
    more = ", ..." if len(parts) > _NUM_SHOWN else ""
    return f"{text}: {', '.join(parts[:_NUM_SHOWN])}{more}" if parts else text


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items, so many at a time."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
