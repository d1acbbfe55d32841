"""What both configurations do for those who read them: the Hub, and PEFT."""

import os
import sys
from typing import Any

from transformers import PreTrainedConfig

from adaptive_longformer.configuration.remote_code import write_remote_code

# How peft's tables of default targets are named, one for each of its methods.
_PEFT_TABLE = "TRANSFORMERS_MODELS_TO_"


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
        """As in Transformers, and tells PEFT, if it is imported, what it adapts by default: the
        layers that it adapts in BERT.

        PEFT has no registry but these tables, and calls `to_dict` right before it looks a
        model_type up there: whichever was imported first, and PEFT is never imported for it.
        """
        constants = vars(sys.modules.get("peft.utils.constants", object))
        for name, table in constants.items():
            if name.startswith(_PEFT_TABLE) and "bert" in table:
                targets = [target.replace("output.dense", "output") for target in table["bert"]]
                table.setdefault(self.model_type, targets)
        return super().to_dict()
