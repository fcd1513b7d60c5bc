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
)
