"""From two sources of pictures to the scores asked for: read once, kept, and measured from what was kept."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from sfumato.data.base import Rows
from sfumato.data.captions import decode, lines_of
from sfumato.errors import BadInput, unknown
from sfumato.fields import Count, Seed, check
from sfumato.files import cache_folder
from sfumato.plan import Plan
from sfumato.progress import track

from .alignment import ClipScore
from .extractors import EncoderFeatures, Extractor, fastest, make_extractor, move, network_bytes
from .features import BATCH, Batches, Features, cache_name, extract, from_cache, into_cache
from .pairs import PairMetric
from .partners import partners
from .perceptual import LPIPS, PSNR, SSIM
from .record import Score
from .sets import SETS, SetMetric
from .sources import Source, one_size

PAIRS = ("psnr", "ssim", "lpips", "clip")
USUAL = ("fid", "kid", "precision", "recall", "density", "coverage")
ALIASES = {"fd": "fid", "kd": "kid", "fd-inf": "fid-inf"}
ALONE = {"is", "clip"}
"""What needs no real pictures."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What is measured, of what, and how."""

    fake: str
    """Generated pictures: a folder, Parquet files, or a file of features that an earlier run kept."""
    real: str | None = None
    """Real pictures (for psnr, ssim and lpips the references), likewise; also "sketch"."""
    metrics: tuple[str, ...] = ()
    """What to measure, separated by blanks or commas."""
    extractor: str | None = None
    """inception (needs --weights), oracle, pixels, random-cnn, or a vision encoder of transformers (folder or hub id);
    by default inception where --weights are given, and the oracle for the sketch world."""
    weights: Path | None = None
    """Weights of the FID's Inception of 2015: a safetensors file."""
    resize: Literal["clean", "tf1-legacy", "torch-bilinear", "torch-antialias"] = "clean"
    """How pictures come to Inception's 299 pixels."""
    clip: str | None = None
    """A CLIP model of transformers (folder or hub id), for clip and cmmd."""
    convention: Literal["torchmetrics", "hessel"] = "torchmetrics"
    """Of the CLIP score: 100 cos, or 2.5 max(cos, 0) with a prefix."""
    prompts: Path | None = None
    """Text file with one prompt a line, in the order of the generated pictures' names."""
    size: Count | None = None
    """Bring all pictures to this side first (centre square, Lanczos); needed where they have different sizes."""
    limit: Count | None = None
    """Use at most this many pictures of each set, the first by name."""
    batch: Count = BATCH
    """Pictures at a time."""
    seed: Seed = 0
    """Of subsets, shuffles, intervals and the random network."""
    cache: Path | None = None
    """Folder in which features are kept for the next run; by default features in the folder that SFUMATO_CACHE
    names, or in .cache/sfumato at home."""
    keep_features: bool = True
    """Keep features for the next run."""
    device: str | None = None
    """Where networks run: cpu, cuda, cuda:1, mps ...; by default the fastest there is. Always in float32."""

    def __post_init__(self) -> None:
        check(self)

    def wanted(self) -> tuple[str, ...]:
        """The metrics asked for, by their names; () for the usual ones.

        Raises:
            BadInput: an unknown metric, or one that needs what was not given.
        """
        words = [w for given in self.metrics for w in given.lower().split(",") if w]
        names = tuple(dict.fromkeys(ALIASES.get(w, w) for w in words))
        for name in names:
            if name not in (*SETS, *PAIRS):
                raise unknown("metric", name, (*SETS, *PAIRS))
        if "clip" in names and (self.clip is None or self.prompts is None):
            raise BadInput("the CLIP score needs --clip MODEL and --prompts FILE")
        comparing = [n for n in names or USUAL if n not in ALONE]
        if self.real is None and comparing:
            raise BadInput(f"{', '.join(comparing)} needs --real: name the pictures to compare with")
        return names

    def folder(self) -> Path | None:
        """Where features are kept."""
        return (self.cache or cache_folder() / "features") if self.keep_features else None


class Run:
    """Sources opened and networks loaded: everything that can be wrong with the input is found here.

    Raises:
        BadInput: what was given cannot be scored.
    """

    def __init__(self, settings: Scoring):
        self.settings = settings
        names = settings.wanted()
        self.fake = Source(settings.fake, settings.limit)
        self.real = Source(settings.real, settings.limit) if settings.real else None
        self.sources = [s for s in (self.real, self.fake) if s]
        _, self.prepared = one_size(self.sources, settings.size)
        self.extractor = self._extractor(names or USUAL)
        self.names = names or (*USUAL, *(("is",) if hasattr(self.extractor, "logits") else ()))
        self.skipped: dict[str, str] = {}
        """Metrics that nobody asked for by name and that cannot be measured here, and why."""
        self.clip = EncoderFeatures(settings.clip) if settings.clip and "cmmd" in self.names else None
        if settings.device is not None:
            for judge in filter(None, (self.extractor, self.clip)):
                move(judge, settings.device)
        self.prompts = self._prompts() if "clip" in self.names else []
        if set(self.names) & set(PAIRS):
            self._check_pairs()
        self.sets = self._set_metrics()
        self.pairs = self._pair_metrics()

    def plan(self, writes: Sequence[str] = ()) -> Plan:
        """Numbers of pictures, memory, and the time that features will take, measured on a few pictures."""
        memory: dict[str, int] = {}
        seconds, writes = 0.0, list(writes)
        for source, extractor in self._jobs():
            file = self._kept(source, extractor)
            if source.given is not None or extractor is None or (file and file.is_file()):
                continue
            few = next(iter(Batches(source.pictures, min(4, source.n), ahead=0)))
            extractor(few[:1])
            start = time.perf_counter()
            d = extractor(few).shape[1]
            seconds += (time.perf_counter() - start) / len(few) * source.n
            memory["weights"] = max(memory.get("weights", 0), network_bytes(extractor))
            memory["features"] = memory.get("features", 0) + 4 * d * source.n
            memory["covariances"] = memory.get("covariances", 0) + 8 * d * d
            writes += [f"{file} (features)"] if file else []
        counts = [f"{s.n} {word}" for s, word in ((self.real, "real"), (self.fake, "generated")) if s]
        title = f"{', '.join(self.names)} of {' and '.join(counts)} pictures"
        return Plan(title, memory, seconds or None, "features need not be computed", writes)

    def scores(self, progress: bool = True) -> list[Score]:
        """All numbers, in the order in which they were asked for."""
        features = {(s, e): self._features(s, e, progress) for s, e in self._jobs()}
        found = self._pairs(progress)
        for name, metric in self.sets.items():
            if name not in found:
                real = features[self.real, metric.extractor] if metric.needs_real else None
                measured = metric.measure(real, features[self.fake, metric.extractor])
                found |= measured if isinstance(measured, dict) else {name: measured}
        return [found[name] for name in self.names]

    def _extractor(self, names: Sequence[str]) -> Extractor | None:
        """The one that was named, or that goes without saying; None where none is needed."""
        s = self.settings
        name = s.extractor
        if name is None:
            if not set(names) & set(SETS) - ({"cmmd"} if s.clip else set()):
                return None
            if s.weights is not None:
                name = "inception"
            elif "sketch" in (s.real, s.fake):
                name = "oracle"
            elif all(source.given is not None for source in self.sources):
                return None
            else:
                raise BadInput(
                    "say with --extractor which features to compare: inception (with --weights FILE), a vision encoder "
                    "of transformers, oracle, pixels or random-cnn"
                )
        return make_extractor(name, s.weights, s.resize, s.seed)

    def _extractor_of(self, name: str) -> Extractor | None:
        return self.clip if name == "cmmd" and self.clip else self.extractor

    def _set_metrics(self) -> dict[str, SetMetric]:
        """The metrics of two sets, by the names that were asked for."""
        metrics = {}
        for name in (n for n in self.names if n in SETS):
            extractor = self._extractor_of(name)
            if name == "is" and extractor is None:
                raise BadInput("the Inception score needs an --extractor that classifies: inception or oracle")
            metric = SETS[name](extractor, seed=self.settings.seed)
            try:
                metric.check(self.real.n if self.real else 0, self.fake.n)
            except BadInput as error:
                if self.settings.metrics:
                    raise
                self.skipped[name] = str(error)
            else:
                metrics[name] = metric
        if self.skipped and not metrics:
            raise BadInput(next(iter(self.skipped.values())))
        self.names = tuple(name for name in self.names if name not in self.skipped)
        return metrics

    def _jobs(self) -> list[tuple[Source, Extractor | None]]:
        """Which features are needed of which set, each once."""
        jobs: dict[tuple[Source, Extractor | None], None] = {}
        for metric in self.sets.values():
            sources = self.sources if metric.needs_real else [self.fake]
            jobs |= {(source, metric.extractor): None for source in sources}
        return list(jobs)

    @cached_property
    def _about(self) -> dict[tuple[Source, Extractor], dict[str, Any]]:
        return {
            (s, e): {"extractor": e.name, "weights": e.hash, "resize": e.resize, "pictures": self.prepared,
                     "content": s.content}
            for s, e in self._jobs() if s.given is None and e is not None
        }  # fmt: skip

    def _kept(self, source: Source, extractor: Extractor | None) -> Path | None:
        """The file that keeps these features."""
        folder, about = self.settings.folder(), self._about.get((source, extractor))
        return folder / cache_name(about) if folder and about else None

    def _features(self, source: Source, extractor: Extractor | None, progress: bool) -> Features:
        """From the file that was given, from the cache, or from the pictures."""
        if source.given is not None:
            return source.given
        if extractor is None:
            raise BadInput("say with --extractor which features to take of the pictures")
        about, folder = self._about[source, extractor], self.settings.folder()
        found = from_cache(folder, about) if folder else None
        if found is None:
            batch = self.settings.batch
            found = Features(extract(source.pictures, extractor, source.n, batch=batch, progress=progress), **about)
            try:
                source.kept = into_cache(folder, found) if folder and len(found) > 1 else None
            except BadInput as error:  # a full disk, or another run that writes them: the scores do not need it
                warnings.warn(f"features were not kept: {error}", stacklevel=2)
        return found

    def _pair_metrics(self) -> dict[str, PairMetric]:
        """The metrics of pictures one by one, with their networks loaded."""
        s = self.settings
        measures = {"psnr": PSNR, "ssim": SSIM, "lpips": LPIPS, "clip": lambda: ClipScore(s.clip, s.convention)}
        metrics: dict[str, PairMetric] = {}
        for name in (n for n in self.names if n in PAIRS):
            measure: Any = measures[name]()
            if s.device is not None or name == "lpips":
                move(measure, s.device or fastest())
            about = {"pictures": self.prepared, "real": "" if name == "clip" else self.real.content}
            metrics[name] = PairMetric(name, measure, better="lower" if name == "lpips" else "higher", seed=s.seed,
                                       convention=getattr(measure, "definition", ""), about=about)  # fmt: skip
        return metrics

    def _pairs(self, progress: bool) -> dict[str, Score]:
        if not self.pairs:
            return {}
        size = self.settings.batch
        referring = bool(set(self.pairs) - {"clip"})
        references = None
        if referring:
            ordered = Rows(self.real.pictures, self.partners)
            references = iter(Batches(ordered, len(ordered), size))
        for i, batch in enumerate(track(Batches(self.fake.pictures, self.fake.n, size), "pairs", show=progress)):
            reference = next(references) if references else None
            for name, metric in self.pairs.items():
                metric.update(batch, self.prompts[i * size : (i + 1) * size] if name == "clip" else reference)
        found = {name: metric.compute() for name, metric in self.pairs.items()}
        return {name: x if name == "clip" else replace(x, n_real=x.n_gen) for name, x in found.items()}

    def _prompts(self) -> list[str]:
        file, n = self.settings.prompts, self.fake.n
        try:
            lines = lines_of(decode(file.read_bytes(), str(file)).removesuffix("\n"))
        except OSError as error:
            raise BadInput(f"{file} cannot be read as a text file: {error}") from error
        lines = lines[:n] if self.settings.limit else lines
        if len(lines) != n or not all(line.strip() for line in lines):
            full = sum(bool(line.strip()) for line in lines)
            raise BadInput(f"{file} has {full} prompts in {len(lines)} lines for {n} pictures: give each a line")
        return lines

    def _check_pairs(self) -> None:
        names = [n for n in self.names if n in PAIRS]
        held = [self.fake] if names == ["clip"] else self.sources
        if any(source.given is not None for source in held):
            raise BadInput(f"{', '.join(names)}: the pictures themselves are needed (a folder or Parquet files)")
        if names != ["clip"]:
            ours = [self.fake.pictures.name(i) for i in range(self.fake.n)]
            theirs = [self.real.pictures.name(i) for i in range(len(self.real.pictures))]
            self.partners = partners(ours, theirs, some=self.settings.limit is not None)
