from setuptools import find_packages, setup

setup(
    name="ds_cp",
    version="0.1.0",
    description="Sequence parallelism for DeepSpeed: ring attention, Ulysses and both, with single-process gradients",
    python_requires=">=3.11",
    packages=find_packages(include=["ds_cp", "ds_cp.*"]),
    entry_points={"console_scripts": ["ds-cp = ds_cp.cli:app"]},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.23,<5.24",
        "accelerate>=1.15,<1.16",
        "pydantic>=2.14,<3",
        "hjson>=3.1",
        "rich>=15",
        "typer>=0.29",
    ],
    extras_require={
        "flash": ["flash-attn-4>=4.0.0b36"],
        "linear": ["flash-linear-attention"],
        "mpi": ["mpi4py"],
        "dev": ["pytest>=9", "hypothesis>=6.170", "ruff>=0.17", "ninja>=1.13", "matplotlib>=3.11", "psutil>=7", "peft>=0.21"],
    },
)
