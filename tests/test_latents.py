"""Latents encoded once: kept, found again, made anew when something else is asked for, and shared by processes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from loop_cases import together
from sfumato.train import autoencoder
from sfumato.train.autoencoder import encode_all


class Mean:
    """An autoencoder whose latents are a picture's mean colours; counts the pictures it encodes."""

    device = torch.device("cpu")

    def __init__(self, breaks_after: int = 10**9):
        self.encoded, self.breaks_after = 0, breaks_after

    def encode(self, x):
        if self.encoded >= self.breaks_after:
            raise KeyboardInterrupt
        self.encoded += len(x)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=x.mean((2, 3), keepdim=True)))


class Flat:
    """Twenty pictures, each of one grey."""

    def __len__(self):
        return 20

    def picture(self, index):
        return np.full((8, 8, 3), 10 * index, np.uint8)


EXPECTED = (torch.arange(20) * 10 / 127.5 - 1)[:, None, None, None].expand(20, 3, 1, 1)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(autoencoder, "BATCH", 2)
    monkeypatch.setattr(autoencoder, "CHUNK", 6)


def test_latents_are_encoded_once(tmp_path):
    first, again = Mean(), Mean()
    for model in (first, again):
        torch.testing.assert_close(encode_all(model, Flat(), tmp_path / "latents.safetensors", "a"), EXPECTED)
    assert (first.encoded, again.encoded) == (20, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["latents.safetensors"]


def test_other_latents_are_made_anew(tmp_path):
    encode_all(Mean(), Flat(), tmp_path / "latents.safetensors", "a")
    other = Mean()
    encode_all(other, Flat(), tmp_path / "latents.safetensors", "b")
    assert other.encoded == 20


def test_interrupted_encoding_goes_on_at_its_chunk(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        encode_all(Mean(breaks_after=14), Flat(), tmp_path / "latents.safetensors", "a")
    rest = Mean()
    torch.testing.assert_close(encode_all(rest, Flat(), tmp_path / "latents.safetensors", "a"), EXPECTED)
    assert rest.encoded == 8, "two chunks of six were there"


def test_a_damaged_chunk_is_made_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        encode_all(Mean(breaks_after=8), Flat(), tmp_path / "latents.safetensors", "a")
    (file,) = (tmp_path / "latents.parts").iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    rest = Mean()
    torch.testing.assert_close(encode_all(rest, Flat(), tmp_path / "latents.safetensors", "a"), EXPECTED)
    assert rest.encoded == 20


def share(folder) -> None:
    autoencoder.BATCH, autoencoder.CHUNK = 2, 6
    model = Mean()
    torch.testing.assert_close(encode_all(model, Flat(), folder / "latents.safetensors", "a"), EXPECTED)
    assert model.encoded in (12, 8), "each process encodes every other chunk"


@pytest.mark.slow
def test_processes_share_the_work(tmp_path):
    together(2, share, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["latents.safetensors"]
