"""`Text2Image`: the one adapter through which every method sees a text-to-image model.

M architectures times N methods cost M + N: methods ask this class, never diffusers' internals. One subclass per
family of pipelines (`sd.py`: SD 1.x/2.x; `sdxl.py`: SDXL).
"""
