"""What both configurations do for those who read them: the Hub, and PEFT."""

import os
import sys
from typing import Any

from transformers import PreTrainedConfig

from adaptive_longformer.configuration.remote_code import write_remote_code

# What LoRA adapts when the user names no target_modules.
LORA_TARGETS = ("query", "value")


class AdaptiveSparseSharedConfig(PreTrainedConfig):
    """A configuration that brings its code to the Hub, and PEFT its targets."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing: a checkpoint imports this package, it carries no copy of its source."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Saves as in Transformers, with the files `auto_map` names if the configuration has one.

        Models save their configuration after their own files, so this also replaces the copy of our
        modeling file that Transformers writes for a model loaded with `trust_remote_code`.
        """
        if getattr(self, "auto_map", None):
            os.makedirs(save_directory, exist_ok=True)
            write_remote_code(save_directory, self.model_type)
        super().save_pretrained(save_directory, *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As in Transformers, and tells PEFT, if it is imported, what LoRA adapts by default.

        PEFT has no registry but this table, and calls `to_dict` right before it looks a model_type
        up there: whichever was imported first, and PEFT is never imported for it.
        """
        if constants := sys.modules.get("peft.utils.constants"):
            table = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
            table.setdefault(self.model_type, list(LORA_TARGETS))
        return super().to_dict()
