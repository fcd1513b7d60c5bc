"""The list of methods: what each is called, where it lives, which papers it carries out and what it costs.

This page is read by the command line, the documentation and the tests, and imports none of the methods. A new
method is one entry in `METHODS` (and one file, one test file, one ledger entry).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sfumato.errors import unknown

if TYPE_CHECKING:
    from typing import Any


@dataclass(frozen=True)
class Paper:
    """One publication: BibTeX key, arXiv number, authors in BibTeX's form; ``venue`` may be empty."""

    key: str
    arxiv: str
    title: str
    authors: str
    year: int
    venue: str

    def __str__(self) -> str:
        return f"arXiv:{self.arxiv} {self.title}"

    @property
    def bibtex(self) -> str:
        fields = {
            "title": f"{{{self.title}}}",
            "author": self.authors,
            "year": str(self.year),
            "booktitle": self.venue,
            "eprint": self.arxiv,
            "archiveprefix": "arXiv",
            "url": f"https://arxiv.org/abs/{self.arxiv}",
        }
        if not self.venue:
            del fields["booktitle"]
        kind = "inproceedings" if self.venue else "misc"
        body = "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items())
        return f"@{kind}{{{self.key},\n{body}}}"


@dataclass(frozen=True)
class Method:
    """One method: ``sfumato VERB NAME`` on the command line (`command`), ``sf.VERB.CLASS`` in Python.

    ``papers`` is what runs, the method's own paper first. ``when`` and ``beware`` help to choose. ``ledger``
    is its entry in the ledger; where that is empty, ``no_ledger`` says why.
    """

    verb: str
    name: str
    cls: str
    papers: tuple[Paper, ...]
    summary: str
    cost: str
    when: str
    beware: str
    ledger: str = ""
    no_ledger: str = ""

    @property
    def paper(self) -> Paper:
        return self.papers[0]

    @property
    def bibtex(self) -> str:
        return "\n\n".join(paper.bibtex for paper in self.papers)

    @property
    def command(self) -> str:
        """The words after ``sfumato`` that run it."""
        # `sfumato sample` takes prompts where other verbs take a method.
        return f"sample --scheduler {self.name}" if self.verb == "sample" else f"{self.verb} {self.name}"

    @property
    def class_name(self) -> str:
        return self.cls.partition(":")[2]

    def load(self) -> type[Any]:
        """Import the class."""
        from importlib import import_module

        module, _, name = self.cls.partition(":")
        return getattr(import_module(module), name)

    @property
    def presets(self) -> Mapping[str, Mapping[str, Any]]:
        """The class's named settings, where it has any; imports it."""
        return getattr(self.load(), "presets", {})

    def as_dict(self) -> dict[str, str]:
        """What ``sfumato methods --json`` prints."""
        return {
            "verb": self.verb,
            "name": self.name,
            "class": self.cls.replace(":", "."),
            "paper": str(self.paper),
            "summary": self.summary,
            "cost": self.cost,
        }


_UCE = Paper(
    "gandikota2024uce", "2308.14761", "Unified Concept Editing in Diffusion Models",
    r"Gandikota, Rohit and Orgad, Hadas and Belinkov, Yonatan and Materzy{\'n}ska, Joanna and Bau, David",
    2024, "IEEE/CVF Winter Conference on Applications of Computer Vision",
)  # fmt: skip
_RECE = Paper(
    "gong2024rece", "2407.12383", "Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models",
    "Gong, Chao and Chen, Kai and Wei, Zhipeng and Chen, Jingjing and Jiang, Yu-Gang",
    2024, "European Conference on Computer Vision",
)  # fmt: skip
_ESD = Paper(
    "gandikota2023esd", "2303.07345", "Erasing Concepts from Diffusion Models",
    r"Gandikota, Rohit and Materzy{\'n}ska, Joanna and Fiotto-Kaufman, Jaden and Bau, David",
    2023, "IEEE/CVF International Conference on Computer Vision",
)  # fmt: skip
_SPM = Paper(
    "lyu2024spm", "2312.16145",
    "One-dimensional Adapter to Rule Them All: Concepts, Diffusion Models and Erasing Applications",
    "Lyu, Mengyao and Yang, Yuhong and Hong, Haiwen and Chen, Hui and Jin, Xuan and He, Yuan and Xue, Hui "
    "and Han, Jungong and Ding, Guiguang",
    2024, "IEEE/CVF Conference on Computer Vision and Pattern Recognition",
)  # fmt: skip
_CONCEPT_INVERSION = Paper(
    "pham2024circumventing", "2308.01508",
    "Circumventing Concept Erasure Methods For Text-to-Image Generative Models",
    "Pham, Minh and Marshall, Kelly O. and Cohen, Niv and Mittal, Govind and Hegde, Chinmay",
    2024, "International Conference on Learning Representations",
)  # fmt: skip
_TEXTUAL_INVERSION = Paper(
    "gal2023textual", "2208.01618",
    "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion",
    "Gal, Rinon and Alaluf, Yuval and Atzmon, Yuval and Patashnik, Or and Bermano, Amit H. and Chechik, Gal "
    "and Cohen-Or, Daniel",
    2023, "International Conference on Learning Representations",
)  # fmt: skip
_LATENT_DIFFUSION = Paper(
    "rombach2022ldm", "2112.10752", "High-Resolution Image Synthesis with Latent Diffusion Models",
    r"Rombach, Robin and Blattmann, Andreas and Lorenz, Dominik and Esser, Patrick and Ommer, Bj{\"o}rn",
    2022, "IEEE/CVF Conference on Computer Vision and Pattern Recognition",
)  # fmt: skip
_GUIDANCE = Paper(
    "ho2022classifierfree", "2207.12598", "Classifier-Free Diffusion Guidance",
    "Ho, Jonathan and Salimans, Tim", 2022, "",
)  # fmt: skip
_FASTER_DIFFUSION = Paper(
    "li2024faster", "2312.09608",
    "Faster Diffusion: Rethinking the Role of the Encoder for Diffusion Model Inference",
    "Li, Senmao and Hu, Taihang and van de Weijer, Joost and Khan, Fahad Shahbaz and Liu, Tao and Li, Linxuan "
    "and Yang, Shiqi and Wang, Yaxing and Cheng, Ming-Ming and Yang, Jian",
    2024, "Advances in Neural Information Processing Systems",
)  # fmt: skip
_MULTISTEP_CM = Paper(
    "heek2024multistep", "2403.06807", "Multistep Consistency Models",
    "Heek, Jonathan and Hoogeboom, Emiel and Salimans, Tim", 2024, "",
)  # fmt: skip
_BLURRING = Paper(
    "hoogeboom2023blurring", "2209.05557", "Blurring Diffusion Models",
    "Hoogeboom, Emiel and Salimans, Tim",
    2023, "International Conference on Learning Representations",
)  # fmt: skip
_HEAT = Paper(
    "rissanen2023generative", "2206.13397", "Generative Modelling With Inverse Heat Dissipation",
    "Rissanen, Severi and Heinonen, Markus and Solin, Arno",
    2023, "International Conference on Learning Representations",
)  # fmt: skip
_S2N = Paper(
    "doan2024connective", "2408.04221", "Connective Viewpoints of Signal-to-Noise Diffusion Models",
    "Doan, Khanh and Vuong, Long Tung and Nguyen, Tuan and Bui, Anh Tuan and Tran, Quyen and Do, Thanh-Toan "
    "and Phung, Dinh and Le, Trung",
    2024, "",
)  # fmt: skip
_SIMPLE = Paper(
    "hoogeboom2023simple", "2301.11093", "simple diffusion: End-to-end diffusion for high resolution images",
    "Hoogeboom, Emiel and Heek, Jonathan and Salimans, Tim",
    2023, "International Conference on Machine Learning",
)  # fmt: skip
_SID2 = Paper(
    "hoogeboom2025simpler", "2410.19324",
    "Simpler Diffusion (SiD2): 1.5 FID on ImageNet512 with pixel-space diffusion",
    "Hoogeboom, Emiel and Mensink, Thomas and Heek, Jonathan and Lamerigts, Kay and Gao, Ruiqi and Salimans, Tim",
    2025, "IEEE/CVF Conference on Computer Vision and Pattern Recognition",
)  # fmt: skip
_OBJECTIVES = Paper(
    "kingma2023understanding", "2303.00848",
    "Understanding Diffusion Objectives as the ELBO with Simple Data Augmentation",
    "Kingma, Diederik P. and Gao, Ruiqi", 2023, "Advances in Neural Information Processing Systems",
)  # fmt: skip
_INTERVAL = Paper(
    "kynkaanniemi2024applying", "2404.07724",
    "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion Models",
    r"Kynk{\"a}{\"a}nniemi, Tuomas and Aittala, Miika and Karras, Tero and Laine, Samuli and Aila, Timo "
    "and Lehtinen, Jaakko",
    2024, "Advances in Neural Information Processing Systems",
)  # fmt: skip
_ROLLING = Paper(
    "ruhe2024rolling", "2402.09470", "Rolling Diffusion Models",
    "Ruhe, David and Heek, Jonathan and Salimans, Tim and Hoogeboom, Emiel",
    2024, "International Conference on Machine Learning",
)  # fmt: skip
INTEGRITY = Paper(
    "schioppa2024integrity", "2411.02068", "Model Integrity when Unlearning with T2I Diffusion Models",
    "Schioppa, Andrea and Hoogeboom, Emiel and Heek, Jonathan", 2024, "",
)  # fmt: skip

METHODS: tuple[Method, ...] = (
    Method(
        "erase", "uce", "sfumato.erase.uce:UCE", (_UCE,),
        "Closed form: rewrites the cross-attention keys and values so that the concept reads as its anchor.",
        cost="seconds, no gradients, no pictures",
        when="Many concepts at once, now; the baseline of all others.",
        beware="An optimised embedding brings the concept back.",
        ledger="uce",
    ),
    Method(
        "erase", "rece", "sfumato.erase.rece:RECE", (_RECE, _UCE),
        "Closed form, iterated: finds the embedding that revives the concept after UCE and erases it too.",
        cost="seconds, no gradients, no pictures",
        when="The first choice: as quick as UCE and, by its paper, harder to undo.",
        beware="Closes the text route only; a small lambda harms neighbours.",
        ledger="rece",
    ),
    Method(
        "erase", "esd-x", "sfumato.erase.esd:ESDx", (_ESD,),
        "Fine-tunes the cross-attention to negative guidance: erases where the prompt names the concept.",
        cost="fine-tuning; about 25 guided sampling steps per update",
        when="Styles and named things, to compare with the literature.",
        beware="Weak under attack, and harms neighbours.",
        ledger="esd",
    ),
    Method(
        "erase", "esd-u", "sfumato.erase.esd:ESDu", (_ESD,),
        "Fine-tunes all but the cross-attention: erases a concept that shows whatever the prompt says.",
        cost="fine-tuning; about 25 guided sampling steps per update",
        when="A concept that shows up unasked.",
        beware="Changes every picture a little; weak under attack.",
        ledger="esd",
    ),
    Method(
        "erase", "spm", "sfumato.erase.spm:SPM", (_SPM,),
        "A rank-1 adapter per concept; they combine, switch off and move to fine-tunes of the same model.",
        cost="fine-tuning of a rank-1 adapter; the base weights never change",
        when="Concepts to combine, switch off, or carry over to fine-tunes.",
        beware="As a plain LoRA it acts at full strength on every prompt.",
        ledger="spm",
    ),
    Method(
        "attack", "concept-inversion", "sfumato.attack.concept_inversion:ConceptInversion",
        (_CONCEPT_INVERSION, _TEXTUAL_INVERSION),
        "Learns a new word on the erased pipeline from pictures of the concept: does it come back?",
        cost="gradient steps on one embedding",
        when="The white-box test that every erased pipeline should face.",
        beware="Needs pictures of the concept, from the original pipeline.",
        no_ledger="it is the yardstick of the RECE and UCE entries",
    ),
    Method(
        "steer", "faster-diffusion", "sfumato.steer.faster_diffusion:FasterDiffusion", (_FASTER_DIFFUSION,),
        "Runs the UNet's encoder at a few key steps only, and the decoders between them in one batch.",
        cost="none; saves about a quarter of the operations of 50 steps",
        when="Faster sampling of any UNet pipeline, without training.",
        beware="Fewer steps need relatively more key steps; parallel decoding takes memory.",
        ledger="faster-diffusion",
    ),
    Method(
        "distill", "multistep-cm", "sfumato.distill.multistep_cm:MultistepCM", (_MULTISTEP_CM,),
        "A few-step student: a consistency model inside each of S segments of time.",
        cost="training; an update costs about twice one of diffusion training",
        when="The same model in 1 to 16 steps, quality against speed by choice of S.",
        beware="Needs pictures as well as the teacher; takes exactly the steps it was made for.",
        ledger="multistep-cm",
    ),
    Method(
        "train", "t2i", "sfumato.train.t2i:TrainT2I", (_LATENT_DIFFUSION, _GUIDANCE),
        "Trains a text-to-image latent diffusion pipeline: autoencoder first, then text encoder and UNet.",
        cost="hours on two CPU cores for the embedded model",
        when="A pipeline of your own, from pictures with captions.",
        beware="Small pictures and small vocabularies on CPU.",
        no_ledger="measured by the oracle when it ends",
    ),
    Method(
        "train", "simple-diffusion", "sfumato.train.simple_diffusion:SimpleDiffusion", (_SIMPLE, _GUIDANCE),
        "Pixel diffusion at any resolution: a schedule that follows the size, and the capacity at 16x16.",
        cost="one network call with gradients an update; the paper's models are for many GPUs",
        when="Pictures of 64 pixels and more without an autoencoder.",
        beware="The published models have billions of parameters; `sid2` needs fewer.",
        ledger="simple-diffusion",
    ),
    Method(
        "train", "sid2", "sfumato.train.sid2:SiD2", (_SID2, _SIMPLE, _OBJECTIVES, _INTERVAL, _GUIDANCE),
        "Pixel diffusion with the sigmoid loss, the Residual U-ViT and guidance in an interval.",
        cost="one network call with gradients an update; half the patch is four times the work",
        when="The first choice for pixel models: classes or none, one loss bias per resolution.",
        beware="The bias, the guidance and its interval are to be chosen for each resolution and model.",
        ledger="sid2",
    ),
    Method(
        "train", "blurring", "sfumato.train.blurring:Blurring", (_BLURRING, _HEAT),
        "Pixel diffusion that blurs and adds noise at once, so that pictures appear from coarse to fine.",
        cost="a plain pixel diffusion's, and two cosine transforms a step",
        when="Long training on little data, where blurring acts as a regulariser.",
        beware="Not ahead of plain diffusion in short runs; by its paper it overtakes late.",
        ledger="blurring",
    ),
    Method(
        "train", "rolling", "sfumato.train.rolling:Rolling", (_ROLLING,),
        "Sequences of any length from a window of frames in which later frames carry more noise.",
        cost="one network call with gradients on a whole window per update",
        when="Long roll-outs of frames whose future is uncertain: video, fluids, weather.",
        beware="Short clips of simple motion gain nothing over ordinary video diffusion.",
        ledger="rolling",
    ),
    Method(
        "sample", "s2n", "sfumato.sample.s2n:S2N", (_S2N,),
        "A sampler with adjustable noise: DDIM, DDPM and what lies between and beyond, on any model.",
        cost="that of DDIM: one network call a step",
        when="50 steps and more, where some fresh noise repairs what the model gets wrong.",
        beware="Below about 20 steps noise only harms; rho is to be tuned for each model.",
        ledger="s2n",
    ),
)  # fmt: skip


def verbs() -> tuple[str, ...]:
    """The verbs that have methods, in the order of the list."""
    return tuple(dict.fromkeys(method.verb for method in METHODS))


def methods(verb: str | None = None) -> tuple[Method, ...]:
    """All methods, or those of one verb."""
    return tuple(method for method in METHODS if verb in (None, method.verb))


def get(name: str, verb: str | None = None) -> Method:
    """The method called ``name``; `BadInput` with the nearest names when there is none."""
    by_name = {method.name: method for method in methods(verb)}
    if name.lower() not in by_name:
        raise unknown(f"{verb} method" if verb else "method", name, by_name)
    return by_name[name.lower()]


def exports(verb: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a verb's package: its classes, imported when they are first used."""
    classes = {method.class_name: method for method in methods(verb)}

    def __getattr__(name: str) -> Any:
        if name not in classes:
            raise AttributeError(f"module 'sfumato.{verb}' has no attribute {name!r}")
        return classes[name].load()

    def __dir__() -> list[str]:
        return sorted(classes)

    return __getattr__, __dir__
