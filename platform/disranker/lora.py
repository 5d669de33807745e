"""Low-rank adapters (Hu et al., arXiv 2106.09685) by peft: trained in place of the weights, and merged into them.

Nothing but training ever sees them: several libraries handle adapters with a score head wrongly.
"""

from typing import TYPE_CHECKING

from torch import nn

from disranker.recipe import Training
from disranker.teacher import hugging_face

if TYPE_CHECKING:
    from peft import PeftModel


def adapt(model: nn.Module, cfg: Training) -> "PeftModel":
    """Puts adapters beside all linear layers, in place, and leaves only them and the score head to be trained."""
    from peft import LoraConfig, TaskType, get_peft_model

    inner = hugging_face(model)
    kind = TaskType.CAUSAL_LM if "CausalLM" in type(inner).__name__ else TaskType.SEQ_CLS
    config = LoraConfig(
        task_type=kind, r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, lora_dropout=0.0, target_modules="all-linear"
    )
    return get_peft_model(inner, config)


def merge(adapted: "PeftModel") -> None:
    """Adds the adapters to the weights they stand beside, in place, and leaves the model that was adapted."""
    adapted.merge_and_unload()
