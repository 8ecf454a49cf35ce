"""A checkpoint in diffusers' layout, given as a local folder or as a hub id from the hub's cache.

Only JSON, tokenizer files and safetensors are read; nothing is downloaded and no code of a
checkpoint is run. Each component is looked at only when it is asked for, so that a teacher
needs no text encoders and a text source needs no UNet.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from sdxl_distill.core.noise_schedule import NoiseSchedule, PredictionType
from sdxl_distill.errors import ConfigError, CorruptError, IncompatibleError
from sdxl_distill.fingerprint import fingerprint
from sdxl_distill.limits import MAX_TIMESTEPS
from sdxl_distill.models.component import Component
from sdxl_distill.models.component_kind import (
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    UNET,
    VAE,
    ComponentKind,
)
from sdxl_distill.models.json_files import read_json
from sdxl_distill.models.tokenizer import load_tokenizer, tokenizer_fingerprint

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOKENIZERS = ("tokenizer", "tokenizer_2")
_TOKENIZER_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")


class ModelFolder:
    """An SDXL checkpoint folder.

    Args:
        reference: the path or the hub id in the configuration.
        folder: the local folder of its files.
        action: the next step for a user when a part is missing.

    Raises:
        ConfigError: when it is not a diffusers folder.
        IncompatibleError: when it holds another model, such as SD 1.5.
    """

    def __init__(self, reference: str, folder: Path, action: str) -> None:
        self.reference = reference
        self.folder = folder
        self._action = action
        self._model_index = read_json(folder / "model_index.json")
        self._check_pipeline_class()

    @classmethod
    def resolve(cls, reference: str) -> ModelFolder:
        """Find a checkpoint by local path, or by hub id in the hub's cache.

        Raises:
            ConfigError: when it is in neither place, or a single file.
            IncompatibleError: when it is not an SDXL checkpoint.
        """
        # A local path: a folder, never a single file.
        folder = Path(reference).expanduser()
        if folder.is_dir():
            action = "check the path, or save the whole pipeline with `save_pretrained`"
            return cls(reference, folder, action)
        if folder.exists():
            raise ConfigError(
                "is a file",
                expected="a folder in diffusers' layout, or a hub id",
                where=reference,
                action="convert it once: "
                "`StableDiffusionXLPipeline.from_single_file(file).save_pretrained(folder)`",
            )
        # A hub id, of which only the cache is searched.
        if not _HUB_ID.fullmatch(reference):
            raise ConfigError(
                "there is no such folder",
                expected="a folder in diffusers' layout, or a hub id as owner/name",
                where=reference,
                action="check the path",
            )
        action = (
            f'with a network: `hf download {reference} --include "model_index.json" "*/*.json" '
            '"*/*.txt" "*/*.safetensors" --exclude "*.fp16.*"`'
        )
        try:
            folder = Path(snapshot_download(reference, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError) as error:
            raise ConfigError(
                "there is no such folder, and the hub's cache on this machine does not hold it",
                where=reference,
                action=action,
            ) from error
        return cls(reference, folder, action)

    @cached_property
    def unet(self) -> Component:
        """The UNet's component. Raises as `vae`."""
        return self._component(UNET)

    @cached_property
    def vae(self) -> Component:
        """The VAE's component.

        Raises:
            ConfigError: when the checkpoint has none.
            IncompatibleError: when it is of another class.
        """
        return self._component(VAE)

    @cached_property
    def text_encoders(self) -> tuple[Component, Component]:
        """Both text encoders' components. Raises as `vae`."""
        return self._component(TEXT_ENCODER), self._component(TEXT_ENCODER_2)

    @cached_property
    def tokenizer_folders(self) -> tuple[Path, Path]:
        """Both tokenizers' folders. Raises as `vae`."""
        first, second = (self._folder(name, _TOKENIZER_CLASSES) for name in _TOKENIZERS)
        return first, second

    def unet_fingerprint(self) -> str:
        """Return the identity of the UNet's weights, 64 hex digits.

        Raises:
            ConfigError, CorruptError, IncompatibleError: as `Component.fingerprint`.
        """
        return self.unet.fingerprint

    def vae_fingerprint(self) -> str:
        """Return the identity of the VAE. Raises as `unet_fingerprint`."""
        return self.vae.fingerprint

    def text_fingerprint(self) -> str:
        """Return the identity of both text encoders with their tokenizers and token limit.

        Raises as `unet_fingerprint`.
        """
        tokenizers = [load_tokenizer(folder) for folder in self.tokenizer_folders]
        return fingerprint(
            {
                "encoders": [encoder.fingerprint for encoder in self.text_encoders],
                "tokenizers": [tokenizer_fingerprint(tokenizer) for tokenizer in tokenizers],
                "num_tokens": [tokenizer.model_max_length for tokenizer in tokenizers],
            }
        )

    def noise_schedule(
        self, prediction_type: str | None = None, zero_terminal_snr: bool | None = None
    ) -> NoiseSchedule:
        """Return the noise schedule that the checkpoint's scheduler describes.

        Args:
            prediction_type: the type to use instead of the scheduler's; many v-prediction
                checkpoints do not state theirs.
            zero_terminal_snr: the value to use instead of the scheduler's.

        Raises:
            ConfigError: when there is no scheduler.
            CorruptError: when a field is of the wrong type.
            IncompatibleError: when it is a scheduler without betas, or with trained ones.
        """
        path = self._existing("scheduler") / "scheduler_config.json"
        config = read_json(path)
        # Only schedulers of which ᾱ can be computed.
        if config.get("trained_betas") is not None:
            raise IncompatibleError("trained_betas are set", expected="null", where=str(path))
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
        absent = [name for name in names if name not in config]
        if absent:
            raise IncompatibleError(
                f"{config.get('_class_name')} without {', '.join(absent)}",
                expected="a scheduler of discrete timesteps with betas",
                where=str(path),
                action="use a checkpoint trained with SDXL's noise schedule",
            )
        num_steps, start, end, schedule = (config[name] for name in names)
        numbers = isinstance(start, int | float) and isinstance(end, int | float)
        if not numbers or type(num_steps) is not int or num_steps > MAX_TIMESTEPS:
            raise CorruptError(
                f"num_train_timesteps {num_steps!r}, beta_start {start!r}, beta_end {end!r}",
                expected=f"three numbers, at most {MAX_TIMESTEPS} timesteps",
                where=str(path),
            )
        # What the checkpoint states, unless the caller knows better.
        if zero_terminal_snr is None:
            zero_terminal_snr = config.get("rescale_betas_zero_snr") is True
        return NoiseSchedule(
            prediction_type=cast(
                "PredictionType", prediction_type or config.get("prediction_type", "epsilon")
            ),
            num_train_timesteps=num_steps,
            beta_start=float(start),
            beta_end=float(end),
            beta_schedule=schedule,
            zero_terminal_snr=zero_terminal_snr,
        )

    def _check_pipeline_class(self) -> None:
        class_name = self._model_index.get("_class_name")
        if not str(class_name).startswith("StableDiffusionXL"):
            raise IncompatibleError(
                f"model_index.json describes a {class_name}",
                expected="a StableDiffusionXLPipeline",
                where=str(self.folder),
                action="use an SDXL checkpoint; SD 1.x and 2.x have other networks",
            )

    def _component(self, kind: ComponentKind) -> Component:
        return Component(kind, self._folder(kind.name, (kind.class_name,)))

    def _folder(self, name: str, class_names: tuple[str, ...]) -> Path:
        entry: Any = self._model_index.get(name)
        class_name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if class_name is not None and class_name not in class_names:
            raise IncompatibleError(
                f"model_index.json says that {name} is a {class_name}",
                expected=" | ".join(class_names),
                where=str(self.folder),
                action="use an SDXL checkpoint",
            )
        return self._existing(name)

    def _existing(self, name: str) -> Path:
        if not (self.folder / name).is_dir():
            raise ConfigError(
                f"the checkpoint has no folder {name}",
                where=str(self.folder),
                action=self._action,
            )
        return self.folder / name
