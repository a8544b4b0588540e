"""Metadata of the distribution ``megatron-slm``. The version lives here and nowhere else."""

from setuptools import find_namespace_packages, setup

# `tokenizers` and `transformers` are needed only to read and write Hugging Face tokenizers and model directories.
HF = ["transformers>=5.0,<6", "tokenizers>=0.22"]
# What `mslm data` needs for near-duplicates, language filters and tokenizer.json; each is imported when used.
DATA = ["datasketch>=1.6,<3", "py3langid>=0.3", "tokenizers>=0.22"]
# NVIDIA's data loader; it runs without a GPU too. PyPI's `nvidia-dali` is a stub that holds a warning.
DALI = "nvidia-dali-cuda130==2.4.0"

setup(
    name="megatron-slm",
    version="0.1.0",
    description="Training of small and large language models over megatron-core that explains where bytes and time go",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.13",
    # `parallel`, `kernels` and `launch` lie beside the package and are reached through the links inside it, so they are
    # installed as megatron_slm.parallel, .kernels and .launch. They have no __init__.py, hence namespace packages.
    packages=find_namespace_packages(
        include=["megatron_slm", "megatron_slm.*"], exclude=["*.__pycache__", "*.__pycache__.*"]
    ),
    package_data={"": ["*.yaml", "*.json", "*.sh", "*.txt"], "megatron_slm": ["py.typed"]},
    include_package_data=False,
    install_requires=[
        # Never without an upper bound: what megatron-core 0.16.1 was tried with.
        "torch>=2.11,<2.14",
        # The last line of core for Python 3.10 and 3.11, and parallel/device.py is written against this release.
        "megatron-core==0.16.1",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "nvidia-ml-py>=12.560",
        "psutil>=5.9",
        "pyarrow>=17",
        "pyyaml>=6.0",
        "safetensors>=0.4.5",
        "sentencepiece>=0.2",
        "tensorboard>=2.16",
        "tqdm>=4.66",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]==2.11.0", DALI],
        "dali": [DALI],
        "prometheus": ["prometheus-client>=0.20"],
        "cluster": ["mpi4py==4.1.2", "mpich==5.0.2"],
        "data": DATA,
        "hf": HF,
        # One exact release: tests compare our logits with the ones it computes, so it must not move by itself. It has
        # none for Python 3.10. `gguf` reads the real weights of tests/bench/hf_parity.py.
        "oracle": ["transformers==5.23.0 ; python_version >= '3.11'", "gguf>=0.17"],
        # What tools/make_oracle_fixtures.py computes the losses' fixtures with, in an environment of its own; no test
        # needs it. One exact release, as its losses change between releases.
        "oracle-trl": ["trl==1.16.0"],
        # EleutherAI's harness asks a run of ours: tools/lm_harness.py.
        "lm-eval": ["lm-eval>=0.4.9"],
        "dev": [
            *("pytest>=8", "pytest-xdist>=3.6", "ruff>=0.9", "mypy>=1.14"),
            *("types-PyYAML", "types-psutil", "types-tqdm"),
        ],
    },
    entry_points={"console_scripts": ["mslm = megatron_slm.cli:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
