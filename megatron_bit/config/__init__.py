"""The configuration: one typed, frozen tree. Imports no torch, so that every command can validate quickly.

Layers, later wins: defaults < preset < YAML file < ``key=value`` on the command line. A file a section.
"""

from megatron_bit.config.data import DataConfig, RemoteConfig, Verify
from megatron_bit.config.diffusion import DiffusionConfig
from megatron_bit.config.load import config_from_dict, flat, leaves, load_config, preset_names, to_yaml, validated
from megatron_bit.config.model import MemoryConfig, ModelConfig
from megatron_bit.config.section import Section
from megatron_bit.config.train import LogConfig
from megatron_bit.config.tree import Config
from megatron_bit.config.yaml_file import TextYaml, read_yaml

__all__ = [
    "Config",
    "DataConfig",
    "DiffusionConfig",
    "LogConfig",
    "MemoryConfig",
    "ModelConfig",
    "RemoteConfig",
    "Section",
    "TextYaml",
    "Verify",
    "config_from_dict",
    "flat",
    "leaves",
    "load_config",
    "preset_names",
    "read_yaml",
    "to_yaml",
    "validated",
]
