"""The model folders that a teacher's sets are made from, found once for a whole command.

A `ModelFolder` keeps the fingerprints that it was asked for: passing it on saves reading
gigabytes again.
"""

from __future__ import annotations

from typing import NamedTuple

from sdxl_distill.config.builder import BuilderConfig
from sdxl_distill.models.model_folder import ModelFolder


class TeacherSources(NamedTuple):
    """Where the networks of a predictions set come from; both may be one folder.

    Attributes:
        teacher: the checkpoint whose UNet predicts.
        text: the checkpoint whose text encoders encode the captions.
    """

    teacher: ModelFolder
    text: ModelFolder

    @classmethod
    def of(cls, config: BuilderConfig) -> TeacherSources:
        """Find both folders.

        Raises:
            ConfigError, IncompatibleError: as `ModelFolder.resolve`.
        """
        teacher = ModelFolder.resolve(config.teacher.checkpoint_path)
        is_own = config.text_source == config.teacher.checkpoint_path
        return cls(teacher, teacher if is_own else ModelFolder.resolve(config.text_source))
