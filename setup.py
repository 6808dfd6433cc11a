"""Packaging only: settings of tools live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup


def under(folder: str) -> list[str]:
    """A top-level namespace folder and the regular packages inside it."""
    return [f"mlip.{folder}"] + [f"mlip.{folder}.{name}" for name in find_packages(folder)]


setup(
    # "mlip" on the package index is another project (interatomic potentials)
    name="mlip-medical",
    version="0.1.0",
    description="Open, fast medical language-image pre-training (MLIP) on chest X-rays and reports",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["mlip", "mlip.*"]) + under("kernels") + under("dataloading"),
    package_dir={"mlip": "mlip", "mlip.kernels": "kernels", "mlip.dataloading": "dataloading"},
    package_data={
        "mlip": ["py.typed"],
        "mlip.pages": ["templates/*"],
        "mlip.knowledge": ["lexicon/*"],
        "mlip.kernels": ["README.md"],
    },
    install_requires=[
        "torch>=2.11",  # no triton pin: torch's own metadata pins it on a GPU
        "numpy>=2",  # 1.x: below what opencv 4.12 takes
        "transformers>=5.17,<6",
        "tokenizers>=0.23.1",  # this and the next: what transformers 5.17 takes
        "safetensors>=0.8",
        "pyyaml>=6",
        "rich>=13",
        "pillow>=12.3",
        "opencv-python-headless>=4.12",  # the first with IMWRITE_PNG_FILTER
        "pydicom>=3.0.2,<4",
        "imagecodecs>=2025.3.30",
        "numba>=0.61",
        "pyarrow>=18",
        "pyahocorasick>=2.2",  # 2.1 loses matches: "is no longer seen" was a finding
        "scikit-learn>=1.5",
        "scipy>=1.13",
        "jinja2>=3.1",
        "psutil>=6",
        "pycocotools>=2.0.8",
    ],
    extras_require={
        "deepspeed": ["deepspeed>=0.19.8,<0.20"],
        "dali": ["nvidia-dali-cuda130>=2.3"],
        "gpu": [
            *("deepspeed>=0.19.8,<0.20", "nvidia-dali-cuda130>=2.3"),
            # wheels for no other processor, and no kernels without them
            'xformers>=0.0.35; platform_machine == "x86_64"',
        ],
        "tensorboard": ["tensorboard>=2.17"],
        "wandb": ["wandb>=0.31"],  # whose settings were seen to keep machine, code and terminal out
        # the whole mlflow, for its pages, has bounds of its own; the last two are its local store
        "mlflow": ["mlflow-skinny>=3.2,<4", "sqlalchemy>=2", "alembic>=1.13"],
        "onnx": ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.22"],  # mlip export --onnx
        "graph": ["torch-geometric>=2.6"],  # mlip knowledge embed
        # torchmetrics 1.6: the first with dice_score
        "dev": [
            *("pytest>=8", "pytest-xdist>=3.6"),
            *("ruff>=0.9", "mypy>=1.13", "triton", "torchmetrics>=1.6"),
            "numpy<2.4",  # 2.4 breaks the interpreter of triton 3.6, the one on a GPU, for tests
            "matplotlib>=3.9",  # curves of benchmarks/step_report.py
            "accelerate>=1.1",  # what transformers.Trainer asks for
        ],
        "docs": ["sphinx>=9,<10", "myst-parser>=5,<6", "furo>=2025.12.19"],  # make site
    },
    entry_points={"console_scripts": ["mlip = mlip.cli:main"]},
)
