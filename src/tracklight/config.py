"""A run's config: read, checked, identified, and turned into objects through one gate."""

from pathlib import Path

from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]

OmegaConf.register_new_resolver("root", lambda path: str(ROOT / path), replace=True)
