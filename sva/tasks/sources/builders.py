"""tensorflow-datasets builders of sva's tasks, prepared on first use, without TensorFlow.

The one module here that imports tensorflow_datasets, so others import it where they need rows. Records are
kept as array_record files under `cache_dir()/datasets` and read by random access.
"""

import contextlib
import io
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from filelock import FileLock

from sva.tasks.base import SPLITS, Example
from sva.tasks.sources import arc_rows, gsm8k_rows, kinds, math_rows
from sva.utils.errors import UserError
from sva.utils.files import disk_error
from sva.utils.paths import cache_dir

_FILE_FORMAT = "array_record"  # tfrecord needs TensorFlow; parquet loses rows (4.9.10)


@dataclass
class SeedConfig(tfds.core.BuilderConfig):
    """Which procedural task, made from which seed."""

    task: str = ""
    seed: int = 0


class SvaProcedural(tfds.core.GeneratorBasedBuilder):
    """The rows of `sva.tasks.sources.kinds`, one config for each task (and seed)."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # tfds 4.9.10 looks for checksums beside it with a package that it does not depend on
    BUILDER_CONFIGS = [SeedConfig(name=name, task=name) for name in kinds.NAMES]

    def _info(self) -> tfds.core.DatasetInfo:
        texts = {name: tfds.features.Text() for name in ("question", "answer", "kind")}
        lists = {name: tfds.features.Sequence(tfds.features.Text()) for name in ("operands", "also")}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Short questions made from a seed. No two splits share a word or operand tuple.",
            features=tfds.features.FeaturesDict({**texts, **lists}),
            license="Apache-2.0",
            disable_shuffling=True,  # rows are shuffled already, and their order is part of the task
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, Example]]:
        config = self.builder_config
        assert isinstance(config, SeedConfig)
        yield from enumerate(kinds.rows(config.task, split, config.seed))


@dataclass
class BenchmarkConfig(tfds.core.BuilderConfig):
    """Which published benchmark; `files` are upstream's splits."""

    files: tuple[str, ...] = ()
    license: str = ""


class SvaBenchmarks(tfds.core.GeneratorBasedBuilder):
    """GSM8K, ARC and MATH with upstream's rows, fields and order."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        BenchmarkConfig(name="gsm8k", files=("train", "test"), license=gsm8k_rows.LICENCE),
        BenchmarkConfig(name="math", files=("train", "test"), license=math_rows.LICENCE),
        *(BenchmarkConfig(name=name, files=SPLITS, license=arc_rows.LICENCE) for name in arc_rows.NAMES),
    ]
    code_path = None  # see SvaProcedural

    def _info(self) -> tfds.core.DatasetInfo:
        assert isinstance(self.builder_config, BenchmarkConfig)
        texts = tfds.features.Sequence(tfds.features.Text())
        choices = tfds.features.FeaturesDict({"text": texts, "label": texts})
        names = {"gsm8k": gsm8k_rows.FIELDS, "math": math_rows.FIELDS}.get(self.builder_config.name, arc_rows.FIELDS)
        fields = {name: choices if name == "choices" else tfds.features.Text() for name in names}
        return tfds.core.DatasetInfo(
            builder=self,
            description="A published benchmark, unchanged.",
            features=tfds.features.FeaturesDict(fields),
            license=self.builder_config.license,
            disable_shuffling=True,  # upstream's order: GSM8K is split by it
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        assert isinstance(self.builder_config, BenchmarkConfig)
        return {split: self._generate_examples(split) for split in self.builder_config.files}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, Example]]:
        name = self.builder_config.name if self.builder_config else ""
        readers = {"gsm8k": gsm8k_rows.upstream_rows, "math": math_rows.upstream_rows}
        yield from enumerate(readers[name](split) if name in readers else arc_rows.upstream_rows(name, split))


class Rows(Sequence[Example]):
    """Examples, decoded as they are read (bytes to str, arrays to lists); `order` picks and orders them."""

    def __init__(self, source: Sequence[Any], order: Sequence[int] | None = None):
        self._source, self._order = source, range(len(source)) if order is None else order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Rows(self._source, self._order[index])
        return _decoded(self._source[self._order[index]])


def _decoded(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {name: _decoded(part) for name, part in value.items()}
    return [_decoded(part) for part in value] if isinstance(value, list) else value


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def prepared(builder_cls: type[tfds.core.GeneratorBasedBuilder], config: Any, place: Path) -> dict[str, Rows]:
    """The splits of a dataset, prepared under `place` if they are not there.

    Several processes may ask at once: one prepares, the others wait. Files that cannot be read are made anew.

    Raises:
      UserError: the disk is full or the cache cannot be written to.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / ".lock"), _quietly():
            try:
                return _splits(builder_cls, config, place)
            except UserError:
                raise
            except Exception:
                shutil.rmtree(place / builder_cls.name / config.name, ignore_errors=True)
                return _splits(builder_cls, config, place)
    except OSError as error:
        raise disk_error(place, error) from error


def _splits(builder_cls: type[tfds.core.GeneratorBasedBuilder], config: Any, place: Path) -> dict[str, Rows]:
    builder = builder_cls(data_dir=place, config=config, file_format=_FILE_FORMAT)
    without_gcs = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_dir=place / "downloads", download_config=without_gcs)
    sources: Any = builder.as_data_source()  # a dict: one source for each split
    splits = {name: Rows(source) for name, source in sources.items()}
    for rows in splits.values():
        _ = rows[0], rows[-1]  # what is cut short or is no record shows here
    return splits


def procedural(name: str, seed: int, split: str) -> Rows:
    """A split of `sva.tasks.sources.kinds.rows`, from a cache whose name changes with what would be kinds."""
    place = cache_dir() / "datasets" / f"procedural-{kinds.fingerprint()}"
    listed = {config.name: config for config in SvaProcedural.BUILDER_CONFIGS}
    config = SeedConfig(name=f"{name}-seed{seed}", task=name, seed=seed) if seed else listed[name]
    return prepared(SvaProcedural, config, place)[split]


def benchmark(name: str, split: str) -> Rows:
    """A split, as upstream cuts it, of GSM8K or ARC."""
    config = next(config for config in SvaBenchmarks.BUILDER_CONFIGS if config.name == name)
    return prepared(SvaBenchmarks, config, cache_dir() / "datasets" / "benchmarks")[split]


def math(split: str) -> Rows:
    """A part of the user's copy of MATH, from a cache whose name changes with the files."""
    config = next(config for config in SvaBenchmarks.BUILDER_CONFIGS if config.name == "math")
    place = cache_dir() / "datasets" / f"math-{math_rows.fingerprint()}"
    return prepared(SvaBenchmarks, config, place)[split]
