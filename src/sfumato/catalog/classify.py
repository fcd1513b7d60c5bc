"""Classify: train a classifier."""

from __future__ import annotations

from .method import Method

METHODS: tuple[Method, ...] = (
    Method(
        "classify", "plain", "sfumato.classify.plain:Plain", ("he2016deep",),
        summary="A network by name, a small ResNet unless told otherwise, by the cross-entropy of labels.",
        cost="one forward and one backward pass of the network per update; minutes on a CPU at 64 pixels",
        when="a judge of your own pictures: a detector for audits, features for distances",
        beware="it answers with one of its classes whatever it is shown",
        no_ledger="It is the baseline that other classifiers are measured against.",
    ),
    Method(
        "classify", "inception-v4", "sfumato.classify.inception_v4:InceptionV4", ("szegedy2017inception",),
        summary="Inception-v4 and Inception-ResNets, with residuals, scaled or not, or without them.",
        cost="at 299 pixels about 13 GMACs a picture forward: weeks of GPUs; small nets: minutes on a CPU",
        when="the published nets and their weights, or to see what residual connections do",
        beware="wide nets die where residuals are not scaled",
        ledger="inception-v4",
    ),
    Method(
        "classify", "tract", "sfumato.classify.tract:TrAct", ("petersen2024tract",),
        summary="A network by name whose first layer is trained as if its pre-activations were; nothing else changes.",
        cost="one small linear system per update beside the network's forward and backward pass",
        when="fewer updates to the same accuracy; with `wrap`, for the first layer of any network",
        beware="pictures must be standardised: lambda is in units of their variance",
        ledger="tract",
    ),
    Method(
        "classify", "sla", "sfumato.classify.sla:SLA", ("lee2020sla",),
        summary="One head over pairs of class and transformation, its copies' answers averaged or taught to another.",
        cost="as many forward and backward passes as copies: 4 for rotations, up to 24",
        when="few labels, and pictures whose quarter turns or colours tell something",
        beware="copies multiply the cost; turned digits are other digits, and colours may be the class",
        ledger="sla",
    ),
    Method(
        "classify", "iformer", "sfumato.classify.iformer:InceptionTransformer", ("si2022inception", "touvron2021deit"),
        summary="The Inception transformer: convolutions and pools beside attention, in shares that go with depth.",
        cost="at 224 pixels 4.8 to 14 GMACs a picture forward: weeks of GPUs; small nets: minutes on a CPU",
        when="the published nets and their weights, maps of four sizes, or to see which frequencies attention keeps",
        beware="trained from nothing it needs many pictures, and the augmentation of DeiT",
        ledger="iformer",
    ),
    Method(
        "classify", "prototype-net", "sfumato.classify.prototype_net:PrototypeNet", ("li2018prototypes",),
        summary="Decides by distances to a few learned prototypes, which are decoded and shown.",
        cost="two nets of four layers: about 2 MMACs a picture of 28 pixels forward; minutes on a CPU for digits",
        when="decisions are to be explained by examples, on small pictures",
        beware="a prototype that is decoded badly explains nothing: look at the training pictures beside it",
        ledger="prototype-net",
    ),
    Method(
        "classify", "prob-psenn", "sfumato.classify.prob_psenn:ProbPSENN", ("vadillo2024probpsenn", "li2018prototypes"),
        summary="Prototypes that are distributions: explanations and labels that say how unsure they are.",
        cost="two nets of five layers, a million weights where grey; minutes on a CPU for digits",
        when="wrong and foreign pictures are to be noticed, and doubts about an explanation seen",
        beware="a sure label and an explanation that fits nothing go together: look at both kinds of doubt",
        ledger="prob-psenn",
    ),
    Method(
        "classify", "projection-head", "sfumato.classify.projection_head:ProjectionHead",
        ("xue2024projection", "khosla2020supervised", "chen2020simclr", "haochen2021spectral"),
        summary="Pre-trains an encoder through a head that is thrown away; probes before and after it.",
        cost="a forward and a backward pass of the network for each of two views; a logistic regression at the end",
        when="labels of training are coarser than those wanted, or features are spurious; to see what a head does",
        beware="where training asks what the task asks, a head changes little",
        ledger="projection-head",
    ),
)
