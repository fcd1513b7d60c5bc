"""The same features through published implementations, where they are installed: the same numbers.

torch-fidelity, torchmetrics, clean-fid and prdc are no dependencies of this package: pip install '.[peers]'
"""

import math

import numpy as np
import pytest
import torch

from sfumato.metrics.frechet import frechet_distance
from sfumato.metrics.inception import Inception, load_inception
from sfumato.metrics.inception_score import inception_score
from sfumato.metrics.kernels import kid
from sfumato.metrics.neighbours import neighbours
from sfumato.metrics.perceptual import PSNR, ssim
from sfumato.metrics.resize import resize


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def sets():
    """Two sets of well-conditioned features of different covariance and mean."""
    mix = torch.eye(64, dtype=torch.float64) + 0.1 * normal(64, 64, 9)
    return normal(500, 64) @ mix, normal(500, 64, 1) * torch.linspace(0.5, 2, 64, dtype=torch.float64) + 0.2


def rng():
    return torch.Generator().manual_seed(0)


def told(what, ours, theirs):
    """Print and return the relative difference; ``pytest -s`` shows it."""
    gap = abs(ours - theirs) / max(abs(theirs), 1e-30)
    print(f"\n{what}: {ours:.12g} against {theirs:.12g}, relative difference {gap:.1e}", end="")
    return gap


def test_torch_fidelity_distances(sets):
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = sets
    theirs = fid.fid_statistics_to_metric(*map(fid.fid_features_to_statistics, sets), False)
    assert told("FID, torch-fidelity", frechet_distance(x, y), theirs["frechet_inception_distance"]) < 1e-10
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    one = {"kid_subsets": 1, "kid_subset_size": 500, "verbose": False}
    theirs = kid_features_to_metric(x, y, **one)["kernel_inception_distance_mean"]
    assert told("KID, torch-fidelity", kid(x, y, rng()).value, theirs) < 1e-10
    theirs = isc_features_to_metric(y, splits=7, shuffle=False)
    ours = inception_score(y, splits=7)
    assert told("IS, torch-fidelity", ours.value, theirs["inception_score_mean"]) < 1e-10
    assert ours.spread == pytest.approx(theirs["inception_score_std"], rel=1e-8)
    found = neighbours(x, y)
    theirs = calculate_precision_recall_full(y, x, 3)
    ours = float(found.precise.double().mean()), float(found.recalled.double().mean())
    print(f"\nprecision and recall, torch-fidelity: ours {ours}, theirs {theirs}", end="")
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_torchmetrics_distances(sets):
    fid = pytest.importorskip("torchmetrics.image.fid")
    from torchmetrics.image.kid import poly_mmd

    x, y = sets
    statistics = [part for s in sets for part in (s.mean(0), torch.cov(s.T))]
    assert told("FID, torchmetrics", frechet_distance(x, y), float(fid._compute_fid(*statistics))) < 1e-10
    assert told("KID, torchmetrics", kid(x, y, rng()).value, float(poly_mmd(x, y))) < 1e-10


def test_clean_fid_distances(sets):
    fid = pytest.importorskip("cleanfid.fid")
    x, y = (s.numpy() for s in sets)
    try:
        theirs = fid.frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    except (TypeError, ValueError) as error:  # scipy has dropped an argument that it passes
        pytest.skip(f"clean-fid does not run with this scipy: {error}")
    assert told("FID, clean-fid", frechet_distance(*sets), float(theirs)) < 1e-6
    theirs = fid.kernel_distance(x, y, num_subsets=1)
    assert told("KID, clean-fid", kid(*sets, rng()).value, theirs) < 1e-10


def test_prdc(sets):
    prdc = pytest.importorskip("prdc")
    theirs = prdc.compute_prdc(real_features=sets[0].numpy(), fake_features=sets[1].numpy(), nearest_k=5)
    found = neighbours(*sets, k=5)
    parts = (found.precise, found.recalled, found.density, found.covered)
    for name, ours in zip(("precision", "recall", "density", "coverage"), parts, strict=True):
        assert told(f"{name}, prdc", float(ours.double().mean()), theirs[name]) < 1e-12


def test_where_a_covariance_is_singular_the_peers_are_off_and_ours_is_right():
    """Fewer pictures than features; the covariances commute, so the distance has a closed form."""
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = (torch.rand(40, generator=torch.Generator().manual_seed(s), dtype=torch.float64) + 0.5 for s in (0, 1))
    q = torch.linalg.qr(normal(200, 200)).Q[:40]
    x, y = (torch.cat([rows, -rows]) for rows in (v.sqrt()[:, None] * q * math.sqrt(79 / 2) for v in (a, b)))
    truth = float((a.sqrt() - b.sqrt()).square().sum())
    theirs = fid.fid_statistics_to_metric(*map(fid.fid_features_to_statistics, (x, y)), False)
    off = told("FID of singular covariances, truth", theirs["frechet_inception_distance"], truth)
    assert told("FID of singular covariances, truth", frechet_distance(x, y), truth) < 1e-11 < off


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of the right shapes, as a pickle for the peers and as safetensors for us."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = Inception()
    for name, x in network.state_dict().items():
        if name.endswith(("bn.weight", "running_var")):
            x.uniform_(0.5, 1.5)
        elif name.endswith(("bn.bias", "running_mean")):
            x.normal_(0, 0.1)
        elif x.ndim == 4:
            torch.nn.init.kaiming_normal_(x)
    folder = tmp_path_factory.mktemp("weights")
    torch.save(network.state_dict(), folder / "w.pth")
    save_file(network.state_dict(), folder / "w.safetensors")
    return folder


def test_the_network_is_torch_fidelitys(weights):
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    peer = theirs("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights / "w.pth")
    ours = load_inception(weights / "w.safetensors")
    x = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8, generator=rng())
    with torch.no_grad():
        features, logits = peer(x)
        found = ours(resize(x, 299, "tf1-legacy"))
        for name, a, b in (("features", found, features), ("logits", ours.logits(found), logits)):
            gap = float((a - b).abs().max() / b.abs().max())
            print(f"\nInception {name}, torch-fidelity: largest difference {gap:.1e} of the largest value", end="")
            assert gap < 1e-5


def test_the_clean_rule_is_clean_fids():
    peer = pytest.importorskip("cleanfid.resize").make_resizer("PIL", False, "bicubic", (299, 299))
    for side in (32, 256, 512):
        x = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, generator=rng())
        theirs = peer(x[0].permute(1, 2, 0).numpy())
        gap = float(np.abs(resize(x, 299, "clean")[0].permute(1, 2, 0).numpy() - theirs).max())
        print(f"\nclean resize from {side}, clean-fid: largest difference {gap:.1e} of 255", end="")
        assert gap < 1e-3


def test_psnr_and_ssim_are_torchmetrics_where_the_conventions_meet():
    functional = pytest.importorskip("torchmetrics.functional.image")
    a = torch.rand(3, 3, 40, 52, generator=rng(), dtype=torch.float64)
    b = (a + 0.1 * torch.rand(3, 3, 40, 52, generator=rng(), dtype=torch.float64)).clamp(0, 1)
    theirs = functional.peak_signal_noise_ratio(a, b, data_range=1.0, reduction=None, dim=(1, 2, 3))
    assert torch.allclose(PSNR()(a, b), theirs, rtol=1e-6)
    mean, full = functional.structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
    inside = full[..., 5:-5, 5:-5].mean((1, 2, 3))
    gap = told("SSIM without its padded border, torchmetrics", float(ssim(a, b).mean()), float(inside.mean()))
    assert gap < 1e-6
    told("SSIM as torchmetrics averages it", float(ssim(a, b).mean()), float(mean))
