"""What lies in an index, and in a table of pseudo-labels: ids, columns, file names and records.

    <index>/encoder-<fingerprint>/bundle/        the encoder; enough to search
    <index>/encoder-<fingerprint>/images.lance   one row an image
    <index>/encoder-<fingerprint>/segments/      codec-<id>.faiss, segment-<id>.faiss, draft
    <index>/encoder-<fingerprint>/queries.npy    what recall is measured with
    <index>/snapshots.lance                      one row a published snapshot
    <index>/lease.json                           who writes now
    <index>/removals/<fingerprint>               an encoder that is being removed; empty
    <index>/reports/<start>-<run>.json, .html    what each run did: `RunReport`, and a page for people
    <index>/work/<run>/                          what a run hands to its workers; removed when it ends

    <labels>/labels.json                         how the labels were made: `LabelRun`
    <labels>/labels.lance                        one row an image: `labels_schema`
    <labels>/vocabulary.txt                      one name a line; a label is a line's number, from 0
    <labels>/vocabulary.safetensors              `text`: the names' vectors [V, D], float32, unit length
    <labels>/bundle/                             the encoder
    <labels>/report.html                         for people; whole when the table is
    <labels>/lease.json, work/<run>/             as in an index

    <finetuning>/finetune.json                   the settings, and what came of each epoch: `FinetuneRun`
    <finetuning>/start/                          the encoder before the training
    <finetuning>/training/                       Ray Train's checkpoints
    <finetuning>/bundle/                         the trained encoder
    <finetuning>/report.html, lease.json         as above

Stages never import each other: they meet through what stands here. Image id = row id of `images.lance`
(stable: it survives deletes and compaction); vector id = image id × 256 + slot, where a slot counts the
vectors that are *stored* for the image. Only this module packs and unpacks them.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator

MAX_SLOTS = 256
"""Slots that a vector id has room for; an encoder with more is refused."""

BOX_SCALE = 255
"""Boxes are stored as x0, y0, x1, y1 in 1/255 of the image's width and height."""

LISTING_SCHEMA = pa.schema([("uri", pa.string()), ("etag", pa.string()), ("size_bytes", pa.int64())])
"""One object of a bucket. `size_bytes` may be null; columns behind these three are the user's metadata."""


def pack_vector_ids(image_ids: NDArray[np.int64], slots: NDArray[np.int64]) -> NDArray[np.int64]:
    """Vector ids [n] from image ids [n] and slots [n].

    Raises:
        ValueError: A slot is outside 0..255, or an image id is negative or has more than 55 bits.
    """
    image_ids, slots = np.asarray(image_ids, np.int64), np.asarray(slots, np.int64)
    if slots.size and (slots.min() < 0 or slots.max() >= MAX_SLOTS):
        raise ValueError(f"slots must lie in 0..{MAX_SLOTS - 1}, got {slots.min()}..{slots.max()}")
    if image_ids.size and (image_ids.min() < 0 or image_ids.max() >= 1 << 55):
        raise ValueError(f"image ids must lie in 0..2^55-1, got {image_ids.min()}..{image_ids.max()}")
    return image_ids * MAX_SLOTS + slots


def image_ids_of(vector_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The image id of each vector id; any shape; FAISS's "nothing found" (-1) stays -1."""
    return np.asarray(vector_ids, np.int64) >> 8


def slots_of(vector_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The slot of each vector id, 0..255; any shape."""
    return np.asarray(vector_ids, np.int64) & (MAX_SLOTS - 1)


def pack_boxes(boxes: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Boxes [..., 4] as fractions x0, y0, x1, y1 -> uint8; rounded outwards, so that none gets empty."""
    scaled = np.clip(np.asarray(boxes, np.float32), 0.0, 1.0) * BOX_SCALE
    low, high = np.floor(scaled[..., :2] + 1e-3), np.ceil(scaled[..., 2:] - 1e-3)
    return np.concatenate([low, high], axis=-1).astype(np.uint8)


def unpack_boxes(boxes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Stored boxes [..., 4] -> fractions x0, y0, x1, y1 of width and height, float32."""
    return np.asarray(boxes, np.float32) / np.float32(BOX_SCALE)


def vectors_type(dim: int) -> pa.DataType:
    """The column of an image's embeddings: list of [D] float16, unit length; empty where `error` is set."""
    return pa.list_(pa.list_(pa.float16(), dim))


BOXES_TYPE = pa.list_(pa.list_(pa.uint8(), 4))
"""The column of an image's boxes, one for each stored vector, in `BOX_SCALE` units."""


def images_schema(dim: int, metadata: pa.Schema | None = None) -> pa.Schema:
    """The columns of `images.lance`, then the user's metadata columns of the manifest (all nullable)."""
    fields = [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string()),
        pa.field("size_bytes", pa.int64()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("error", pa.string()),
        pa.field("vectors", vectors_type(dim)),
        pa.field("boxes", BOXES_TYPE),
        pa.field("encoded_at", pa.timestamp("us", tz="UTC")),
    ]
    return pa.schema(fields + [field.with_nullable(True) for field in metadata or []])


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Segment(_Record):
    """One immutable FAISS file: the vectors of the images with `first_image_id` <= id < `end_image_id`.

    Attributes:
        num_vectors: In the file.
        num_dead: Of these, of images that the snapshot's table holds no more: searches pass them over.
        imbalance: FAISS's imbalance factor of its lists: 1 where all are equally long, `nlist` where one
            list holds everything; what a search scans grows with it.
    """

    segment_id: str
    codec_id: str
    file_name: str
    sha256: str
    num_bytes: int
    num_vectors: int
    first_image_id: int
    end_image_id: int
    num_dead: int = 0
    imbalance: float = 1.0

    @property
    def num_live(self) -> int:
        """Vectors that searches may find."""
        return self.num_vectors - self.num_dead


class Codec(_Record):
    """The trained, empty FAISS index that all segments of a snapshot share.

    Attributes:
        wanted: The factory string that the user asked for; None where the plan chose.
        imbalance: Of the lists when the first segments were built on it; drift is measured against it.
        recall_at_50: Of the first snapshot on it, likewise.
    """

    codec_id: str
    file_name: str
    sha256: str
    num_bytes: int
    factory: str
    dim: int
    nlist: int
    num_trained_on: int
    wanted: str | None = None
    imbalance: float | None = None
    recall_at_50: float | None = None


class SnapshotRecord(_Record):
    """A snapshot but for its deleted image ids, of which there may be a million: what may be held of many.

    Attributes:
        images_version: Of `images.lance`.
        nprobe: Lists that a search looks at in each segment.
        target_recall: What `nprobe` was chosen for; None where nothing had to be found.
        restores: The snapshot that this one repeats, where somebody rolled back; else None.
    """

    snapshot_id: int
    created_at: datetime.datetime
    fingerprint: str
    images_version: int
    codec: Codec | None
    segments: list[Segment]
    nprobe: int
    listed: int
    indexed: int
    quarantined: int
    num_vectors: int
    recall_at_50: float | None
    target_recall: float | None = None
    restores: int | None = None


def _ascending(ids: Any) -> NDArray[np.int64]:
    found = np.sort(np.asarray(ids, np.int64))
    found.flags.writeable = False
    return found


class Snapshot(SnapshotRecord):
    """What searches see: one published state of an index.

    Attributes:
        deleted_image_ids: int64 [n], ascending: of images that the table holds no more and segments still do.
            8 bytes an id; as JSON a list.
    """

    deleted_image_ids: Annotated[
        NDArray[np.int64],
        PlainValidator(_ascending),
        PlainSerializer(lambda ids: np.asarray(ids).tolist(), when_used="json"),
    ]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Snapshot):
            return NotImplemented
        mine, its = dict(self.__dict__), dict(other.__dict__)
        return np.array_equal(mine.pop("deleted_image_ids"), its.pop("deleted_image_ids")) and mine == its

    __hash__ = None  # type: ignore[assignment]  # an array has none


class StageTime(_Record):
    """How long one stage of a run took, and what it got done: `done` of `unit` (images, segments)."""

    name: str
    seconds: float
    done: int = 0
    unit: str = "images"


class WorkTime(_Record):
    """What the workers of an encode stage did, in seconds summed over all of them.

    Attributes:
        read_seconds: Fetching and decoding.
        wait_seconds: Actors without a block to encode.
        encode_seconds: Actors with one.
        write_seconds: Writing files of the table.
        num_actors: That encoded, at most.
        has_gpus: Whether the actors had GPUs.
    """

    read_seconds: float = 0.0
    wait_seconds: float = 0.0
    encode_seconds: float = 0.0
    write_seconds: float = 0.0
    num_actors: int = 0
    has_gpus: bool = False


class Cause(_Record):
    """A reason of quarantine, the number of images that it holds for, and some of their uris."""

    cause: str
    count: int
    examples: tuple[str, ...] = ()


class GrowthPoint(_Record):
    """An index at one snapshot."""

    snapshot_id: int
    created_at: datetime.datetime
    indexed: int
    quarantined: int
    num_vectors: int
    num_segments: int
    num_bytes: int


class RunReport(_Record):
    """`reports/<start>-<run>.json`: what one run of the index job found, did, and took.

    Attributes:
        outcome: `published`, `unchanged`, or `failed`.
        message: What the job said at its end; of a failed run, the error.
        snapshot_id: That searches see after the run; None where there never was one.
        skipped: Images that were gone, replaced or denied when they were to be read.
        dead_vectors: Still in segments, of images that are gone.
        segment_bytes: Of all segments.
        nprobe: Lists that a search looks at in each segment.
        stages: In the order in which they ran; a stage that ran twice is there twice.
        work: Of the encode stage; None where nothing was encoded.
        causes: All reasons of quarantine, the commonest first.
        growth: The last snapshots, the oldest first.
    """

    run_id: str
    started_at: datetime.datetime
    seconds: float
    outcome: str
    message: str
    images_uri: str
    index_uri: str
    encoder: str
    fingerprint: str
    snapshot_id: int | None = None
    listed: int = 0
    new: int = 0
    changed: int = 0
    gone: int = 0
    unchanged: int = 0
    skipped: int = 0
    indexed: int = 0
    quarantined: int = 0
    num_vectors: int = 0
    dead_vectors: int = 0
    num_segments: int = 0
    segment_bytes: int = 0
    codec: str | None = None
    nprobe: int | None = None
    recall_at_50: float | None = None
    images_per_second: float = 0.0
    stages: tuple[StageTime, ...] = ()
    work: WorkTime | None = None
    causes: tuple[Cause, ...] = ()
    growth: tuple[GrowthPoint, ...] = ()


LABELS_FORMAT = 1
"""Of `LabelRun` and `labels_schema`: raised when an older reader could not read them rightly."""


class LabelRun(_Record):
    """`labels.json`: what a table of pseudo-labels was made with. Other settings need another place.

    Attributes:
        format: `LABELS_FORMAT`.
        dataset: Its name.
        images_uri: Where its images lie.
        encoder: What people call the encoder; `bundle/` is it.
        fingerprint: Of the encoder with the head that labelled.
        backbone_fingerprint: Of what determines `features`: the same for all heads of a backbone.
        text_fingerprint: Of what determines the vocabulary's vectors: weights and prompts.
        head: Whose slots were labelled; k-means clusters as a rule.
        num_slots: N of that head.
        vocabulary: `imagenet21k`, or the file's uri.
        vocabulary_sha256: Of `vocabulary.txt`.
        num_names: V.
        exclude_novel: Whether names that mean a novel category were left out.
        dropped_names: Those names.
        threshold: Labels have a probability above this.
        num_labels: Of an image, at most.
        logit_scale: What cosines were multiplied with.
        has_features: Whether the table has the column `features`.
        num_prefix: P, tokens before the cells.
        height: Of the feature map, in cells.
        width: Of the feature map, in cells; K = height · width.
        channels: C.
    """

    format: int = LABELS_FORMAT
    dataset: str
    images_uri: str
    encoder: str
    fingerprint: str
    backbone_fingerprint: str
    text_fingerprint: str
    head: str
    num_slots: int
    vocabulary: str
    vocabulary_sha256: str
    num_names: int
    exclude_novel: bool
    dropped_names: tuple[str, ...]
    threshold: float
    num_labels: int
    logit_scale: float
    has_features: bool
    num_prefix: int
    height: int
    width: int
    channels: int

    @property
    def num_tokens(self) -> int:
        """T = P + K."""
        return self.num_prefix + self.height * self.width


def labels_schema(run: LabelRun) -> pa.Schema:
    """The columns of `labels.lance`.

    `labels` are indices into the vocabulary, the most probable first, and `probabilities` theirs; both may
    be empty. `features` are the backbone's tokens [T · C], the prefix before the cells, row by row. Where
    `error` is set there are no labels and no features.
    """
    fields = [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string()),
        pa.field("size_bytes", pa.int64()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("error", pa.string()),
        pa.field("labels", pa.list_(pa.int32())),
        pa.field("probabilities", pa.list_(pa.float32())),
        pa.field("encoded_at", pa.timestamp("us", tz="UTC")),
    ]
    if run.has_features:
        fields.append(pa.field("features", pa.list_(pa.float16(), run.num_tokens * run.channels)))
    return pa.schema(fields)


class LossPoint(_Record):
    """The mean of each loss over some steps of an epoch, up to and with `step`."""

    step: int
    losses: dict[str, float]


class EpochMetrics(_Record):
    """What one epoch of fine-tuning was like.

    Attributes:
        epoch: From 1.
        lr: The learning rate of its last step.
        losses: Mean of each loss (`sup`, `pse`) over the steps.
        curve: The same in more detail.
        num_matched: Labels that had a slot, by loss.
        num_dropped: Labels that had none, because an image has more labels than slots, by loss.
        num_unreadable: Images that could not be read, and were passed over.
        val: mAP@50 of `base`, `novel` and `all` categories on validation images; None without any.
        held_out_base: mAP@50 of base categories on images that were kept from training; None without any.
        held_out_pseudo: The same of the categories of their pseudo-labels, which stand for the truth.
        measures: Recipes of towers: what they do on validation images, by name, 0 to 1; None without any.
        measures_before: The same before the first step; in the first epoch alone.
        num_val_unreadable: Validation images that could not be read, or have no finite vector, and were left
            out of `measures`.
        val_problem: Why there are no `measures` although there are validation images; None elsewhere.
        seconds: Of the training alone.
        seconds_measuring: Of the measures.
    """

    epoch: int
    lr: float
    losses: dict[str, float]
    curve: tuple[LossPoint, ...] = ()
    num_matched: dict[str, int]
    num_dropped: dict[str, int]
    num_unreadable: int = 0
    val: dict[str, float | None] | None = None
    held_out_base: float | None = None
    held_out_pseudo: float | None = None
    measures: dict[str, float] | None = None
    measures_before: dict[str, float] | None = None
    num_val_unreadable: int = 0
    val_problem: str | None = None
    seconds: float
    seconds_measuring: float = 0.0

    @property
    def held_out(self) -> float | None:
        """What the best epoch is chosen by: the mean of what was measured on held-out images."""
        found = [each for each in (self.held_out_base, self.held_out_pseudo) if each is not None]
        return sum(found) / len(found) if found else None


class FinetuneRun(_Record):
    """`finetune.json`: the settings of a fine-tuning, and what came of it.

    Attributes:
        identity: Hash of the settings and of what is trained on: another one is another run.
        settings: Of the job, those that decide what is learnt.
        num_images: That are trained on.
        num_labelled: Of these, with labels.
        num_held_out: Kept from training.
        num_missing: Of the data set, that are not there, or unreadable.
        fingerprint: Of the encoder that came out; None while it is trained.
        selected_epoch: Which one the encoder is of; None while it is trained.
        epochs: What each was like; empty while it is trained.
    """

    identity: str
    settings: dict[str, str | int | float | bool | None]
    num_images: int
    num_labelled: int
    num_held_out: int
    num_missing: int
    fingerprint: str | None = None
    selected_epoch: int | None = None
    epochs: tuple[EpochMetrics, ...] = ()


class FinetuneLayout:
    """The uris of a fine-tuning. Pure text: nothing is read or made.

    Args:
        output_uri: A folder or `s3://bucket/prefix`; a slash at the end is dropped.
    """

    def __init__(self, output_uri: str) -> None:
        self.output_uri = output_uri.rstrip("/")

    @property
    def run_uri(self) -> str:
        """The record of the run."""
        return f"{self.output_uri}/finetune.json"

    @property
    def start_uri(self) -> str:
        """The encoder as it was before the training."""
        return f"{self.output_uri}/start"

    @property
    def training_uri(self) -> str:
        """Ray Train's: checkpoints."""
        return f"{self.output_uri}/training"

    @property
    def bundle_uri(self) -> str:
        """The trained encoder."""
        return f"{self.output_uri}/bundle"

    @property
    def report_uri(self) -> str:
        """The page for people."""
        return f"{self.output_uri}/report.html"

    @property
    def lease_uri(self) -> str:
        """The lease that lets one run write."""
        return f"{self.output_uri}/lease.json"


class Layout:
    """The uris inside an index. Pure text: nothing is read or made.

    Args:
        index_uri: A folder or `s3://bucket/prefix`; a slash at the end is dropped.
    """

    def __init__(self, index_uri: str) -> None:
        self.index_uri = index_uri.rstrip("/")

    @property
    def snapshots_uri(self) -> str:
        """The table of published snapshots."""
        return f"{self.index_uri}/snapshots.lance"

    @property
    def lease_uri(self) -> str:
        """The lease that lets one run write."""
        return f"{self.index_uri}/lease.json"

    def removal_uri(self, fingerprint: str) -> str:
        """The mark of an encoder that is being removed; all marks where the fingerprint is empty."""
        return f"{self.index_uri}/removals/{fingerprint}"

    def encoder_uri(self, fingerprint: str) -> str:
        """Everything that one encoder made."""
        return f"{self.index_uri}/encoder-{fingerprint}"

    def bundle_uri(self, fingerprint: str) -> str:
        """The encoder itself."""
        return f"{self.encoder_uri(fingerprint)}/bundle"

    def images_uri(self, fingerprint: str) -> str:
        """The table of encoded images."""
        return f"{self.encoder_uri(fingerprint)}/images.lance"

    def queries_uri(self, fingerprint: str) -> str:
        """The vectors [Q, D] of the names that recall is measured with: `.npy`, float32, unit length."""
        return f"{self.encoder_uri(fingerprint)}/queries.npy"

    def segment_uri(self, fingerprint: str, file_name: str) -> str:
        """A segment or a codec."""
        return f"{self.encoder_uri(fingerprint)}/segments/{file_name}"

    def draft_uri(self, fingerprint: str) -> str:
        """What a run has built and not published yet."""
        return self.segment_uri(fingerprint, "draft")

    def work_uri(self, run_id: str) -> str:
        """What a run hands to its workers."""
        return f"{self.index_uri}/work/{run_id}"

    def report_uri(self, name: str) -> str:
        """A run's report, without its suffix; all reports where the name is empty."""
        return f"{self.index_uri}/reports/{name}"


class LabelLayout:
    """The uris of a table of pseudo-labels and what belongs to it. Pure text: nothing is read or made.

    Args:
        output_uri: A folder or `s3://bucket/prefix`; a slash at the end is dropped.
    """

    def __init__(self, output_uri: str) -> None:
        self.output_uri = output_uri.rstrip("/")

    @property
    def run_uri(self) -> str:
        """The record of how the labels were made."""
        return f"{self.output_uri}/labels.json"

    @property
    def table_uri(self) -> str:
        """The table of labelled images."""
        return f"{self.output_uri}/labels.lance"

    @property
    def names_uri(self) -> str:
        """The vocabulary, one name a line."""
        return f"{self.output_uri}/vocabulary.txt"

    @property
    def text_uri(self) -> str:
        """The vocabulary's vectors."""
        return f"{self.output_uri}/vocabulary.safetensors"

    @property
    def bundle_uri(self) -> str:
        """The encoder."""
        return f"{self.output_uri}/bundle"

    @property
    def report_uri(self) -> str:
        """The page for people."""
        return f"{self.output_uri}/report.html"

    @property
    def lease_uri(self) -> str:
        """The lease that lets one run write."""
        return f"{self.output_uri}/lease.json"

    def work_uri(self, run_id: str) -> str:
        """What a run hands to its workers."""
        return f"{self.output_uri}/work/{run_id}"
