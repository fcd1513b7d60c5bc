"""Faster Diffusion against the plain pipeline, on the full UNet shape of SD 1.x with random weights, in one process.

    python benchmarks/faster_diffusion.py                            # 50 guided DDIM steps, 9 key steps; long on a CPU
    python benchmarks/faster_diffusion.py --steps 20 --side 32       # seven key steps; quicker
    python benchmarks/faster_diffusion.py --device cuda --dtype float16
    python benchmarks/faster_diffusion.py --small                    # a small UNet: only to see that it works

Each row draws the same latents, from noise to clean, text encoder and autoencoder left out; all that are compared take
turns, ``--repeats`` times, and the fastest run of each counts. "ideal" is the plain time divided by the ratio of the
operations (of matrix products and convolutions, counted), "over ideal" how much longer the run took than that,
"distance" the relative distance of the result to the plain one, which with random weights says little. The
peer is the one cache of diffusers that runs on its UNets, Pyramid Attention Broadcast: it reuses the output of the
self-attention every second step and of the cross-attention every third, between timesteps 100 and 800.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from sfumato.pipeline import Conditioning, Text2Image, wrap
from sfumato.pipeline.split import operations
from sfumato.pipeline.steering import Interceptor
from sfumato.steer import FasterDiffusion
from sfumato.steer.faster_diffusion import key_steps

WIDTH, LENGTH, GUIDANCE = 768, 77, 7.5
SMALL = {"block_out_channels": (32, 64, 64, 64), "attention_head_dim": 4}
PEER = "pyramid_attention_broadcast"


def model(small: bool, device: str, dtype: torch.dtype) -> Text2Image:
    """Stable Diffusion 1.x's UNet (diffusers' defaults are its shape), and an autoencoder that is never run."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=WIDTH, **(SMALL if small else {}))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        norm_num_groups=1,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae, None, None, unet, scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    for part in (unet, vae):
        part.to(device, dtype)
    return wrap(pipe)


def conditioning(rows: int, seed: int, device: str) -> Conditioning:
    tokens = torch.randn(rows, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))
    none = torch.zeros(rows, LENGTH, dtype=torch.long)
    return Conditioning(tokens, none, none.bool(), prompts=("",) * rows).map(lambda x: x.to(device))


@contextmanager
def peer(p: Text2Image) -> Iterator[None]:
    """Diffusers' Pyramid Attention Broadcast on the UNet, for a block."""
    from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
    from diffusers.hooks import HookRegistry

    now = {"timestep": 0.0}

    class Clock(Interceptor):
        def before_network(self, run, z):
            now["timestep"] = run.timesteps[run.index]
            return z

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=3,
        current_timestep_callback=lambda: now["timestep"],
    )
    apply_pyramid_attention_broadcast(p.network, config)
    try:
        with p.intercept(Clock()):
            yield
    finally:
        HookRegistry.check_if_exists_or_initialize(p.network).remove_hook(PEER, recurse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sampling-steps", "--steps", type=int, default=50)
    parser.add_argument("--side", type=int, nargs="+", default=[32, 64], help="sides of the latents")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2], help="pictures at a time")
    parser.add_argument("--chunk", type=int, nargs="+", default=[0], help="limits of parallel decoding; 0 is none")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--small", action="store_true", help="a small UNet instead")
    options = parser.parse_args()

    dtype = getattr(torch, options.dtype)
    p, keys = model(options.small, options.device, dtype), key_steps(options.sampling_steps)
    ways: dict[str, Callable[[], AbstractContextManager]] = {
        "plain": nullcontext,
        "serial": lambda: FasterDiffusion(mode="serial").patch(p),
        **{
            f"parallel, chunk {chunk or 'none'}": partial(FasterDiffusion(chunk=chunk).patch, p)
            for chunk in options.chunk
        },
        "diffusers' PAB": lambda: peer(p),
    }
    millions = sum(x.numel() for x in p.network.parameters()) / 1e6
    print(f"{millions:.0f} M parameters, {options.dtype} on {options.device}, {torch.get_num_threads()} threads")
    print(f"{options.sampling_steps} guided DDIM steps, {len(keys)} key steps: {', '.join(map(str, keys))}")
    for side in options.side:
        z = torch.zeros(1, 4, side, side, device=options.device, dtype=dtype)
        tokens = conditioning(1, 0, options.device).tokens.to(dtype)
        encoder, decoder = (x / 1e9 for x in operations(p.network, z, encoder_hidden_states=tokens))
        ratio = options.sampling_steps * (encoder + decoder) / (len(keys) * encoder + options.sampling_steps * decoder)
        print(f"\nlatents {side} x {side}: encoder {2 * encoder:.4g}, decoder {2 * decoder:.4g} GFLOPs a guided step; "
              f"plain {ratio:.3f} times the operations of Faster Diffusion")  # fmt: skip
        print(f"{'batch':>5}  {'':22} {'s a step':>9} {'s a run':>8} {'ratio':>6} {'over ideal':>10} "
              f"{'TFLOPs a run':>12} {'distance':>9}")  # fmt: skip
        for batch in options.batch:
            cond, negative = (conditioning(batch, seed, options.device) for seed in (1, 2))

            def draw(steps: int = options.sampling_steps, cond=cond, negative=negative, side=side) -> Tensor:
                z, _ = p.trajectory(
                    cond, range(len(cond)), sampling_steps=steps, stop_after=steps, cfg_scale=GUIDANCE,
                    negative=negative, size=side * p.scale_factor,
                )  # fmt: skip
                return z.float().cpu()  # waits for the device

            best: dict[str, float] = {}
            drawn: dict[str, Tensor] = {}
            rows = {"plain": (2 * batch * options.sampling_steps, 2 * batch * options.sampling_steps)}
            draw(1)
            for _ in range(options.repeats):
                for name, way in ways.items():
                    with way() as told:
                        began = time.perf_counter()
                        drawn[name] = draw()
                        seconds = time.perf_counter() - began
                    best[name] = min(seconds, best.get(name, seconds))
                    if told:
                        rows[name] = told["encoder_rows"], told["decoder_rows"]
            for name in ways:
                gain, (first, second) = best["plain"] / best[name], rows.get(name, (0, 0))
                over = f"{ratio / gain - 1:+.1%}" if first and name != "plain" else "-"
                flops = f"{(first * encoder + second * decoder) / 1e3:.2f}" if first else "-"
                away = float((drawn[name] - drawn["plain"]).norm() / drawn["plain"].norm())
                print(f"{batch:>5}  {name:22} {best[name] / options.sampling_steps:9.3f} {best[name]:8.2f} {gain:6.3f} "
                      f"{over:>10} {flops:>12} {away:9.2e}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
