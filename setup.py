"""Packaging of flm_megatron. Tools' settings live in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    name="flm_megatron",
    version="0.1.0",
    description="Train very large language models in stages, with function-preserving growth, on megatron-core",
    license="Apache-2.0",
    packages=find_packages(include=["flm_megatron*"]),
    package_data={
        "flm_megatron": ["config/presets/*.yaml", "training/cluster/templates/*", "evaluation/report/page.*"]
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "megatron-core==0.16.1",
        "numpy>=1.26",
        "filelock",
        "isal>=1.8",
        "jinja2",
        "psutil",
        "pydantic>=2.7",
        "pyyaml",
        "safetensors",
        "sentencepiece",
        "tensorboard",
        "matplotlib",
        "tqdm",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]"],
        "screen": ["datasketch", "py3langid", "scikit-learn"],
        "eval": ["lm_eval>=0.4.9"],
        "dev": [
            "pytest",
            "pytest-timeout",
            "hypothesis",
            "datasketch",
            "py3langid",
            "scikit-learn",
            "transformers>=4.45",
            "lm_eval>=0.4.9",
            "ruff",
            "mypy",
            "types-PyYAML",
            "types-tqdm",
            "types-psutil",
            'triton; platform_system == "Linux" and platform_machine == "x86_64"',
        ],
    },
    entry_points={"console_scripts": ["flm = flm_megatron.cli.main:main"]},
)
