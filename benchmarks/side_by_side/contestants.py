"""The models that are compared, with the same width and depth and random weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    BigBirdConfig,
    BigBirdModel,
    LEDConfig,
    LongformerConfig,
    LongformerModel,
    ModernBertConfig,
    ModernBertModel,
    RobertaConfig,
    RobertaModel,
)
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention
from transformers.models.led.modeling_led import LEDEncoder
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention
from transformers.models.modernbert.modeling_modernbert import ModernBertAttention
from transformers.models.roberta.modeling_roberta import RobertaSelfAttention

from adaptive_longformer import (
    AdaptiveSparseConfig,
    AdaptiveSparseModel,
    AdaptiveSparseSeq2SeqConfig,
    convert_checkpoint,
)
from adaptive_longformer.modeling.attention_layer import AdaptiveSparseAttention
from adaptive_longformer.modeling.modeling_adaptive_sparse_seq2seq import (
    AdaptiveSparseSeq2SeqEncoder,
)

OURS, LONGFORMER, ROBERTA = "adaptive_sparse", "longformer", "roberta-sdpa"
OURS_BIG_BIRD, BIG_BIRD = "adaptive_sparse-big_bird", "bigbird"
OURS_LED, LED = "adaptive_sparse-led-encoder", "led-encoder"
NAMES = (OURS, LONGFORMER, BIG_BIRD, ROBERTA, "modernbert-sdpa")
FAMILIES = ((OURS, LONGFORMER), (OURS_BIG_BIRD, BIG_BIRD), (OURS_LED, LED))
LAYER_NAMES = (*NAMES[:-1], "modernbert-local-sdpa")


@dataclass(frozen=True)
class Shape:
    """What all contestants have in common."""

    length: int
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    attention_window: int = 512
    vocab_size: int = 50265

    @property
    def intermediate_size(self) -> int:
        return 4 * self.hidden_size


def is_dense(name: str) -> bool:
    """Whether every token sees every token, in at least one layer."""
    return name in (ROBERTA, "modernbert-sdpa")


def why_not(name: str, shape: Shape, dropout: float, device: torch.device) -> str | None:
    """Why a contestant cannot run at this size, or None."""
    if name == BIG_BIRD and shape.length <= 704:
        return "switches to dense attention up to 704 tokens"
    # With dropout SDPA has no fused kernel on the CPU and keeps several [heads, length, length].
    if device.type == "cpu" and dropout and ("roberta" in name or "modernbert" in name):
        needed = 5 * 4 * shape.num_heads * shape.length**2
    elif device.type == "cpu" and "modernbert" in name:
        needed = 8 * shape.length**2  # the dense mask of the local layers
    else:
        needed = 0
    available = _available_memory()
    if available is not None and needed > 0.7 * available:
        return f"needs about {needed / 2**30:.0f} GiB"
    return None


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _common(shape: Shape, dropout: float) -> dict:
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "intermediate_size": shape.intermediate_size,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }


def longformer_config(shape: Shape, dropout: float) -> LongformerConfig:
    return LongformerConfig(
        **_common(shape, dropout),
        attention_window=shape.attention_window,
        max_position_embeddings=shape.length + 2,
        type_vocab_size=1,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        sep_token_id=2,
    )


def adaptive_sparse_config(shape: Shape, dropout: float) -> AdaptiveSparseConfig:
    return AdaptiveSparseConfig(
        **_common(shape, dropout),
        attention_window=shape.attention_window,
        max_position_embeddings=shape.length + 2,
        separate_global_projections=True,
        default_global_tokens="none",
    )


def _bigbird_config(shape: Shape, dropout: float) -> BigBirdConfig:
    return BigBirdConfig(
        **_common(shape, dropout),
        max_position_embeddings=shape.length,
        attention_type="block_sparse",
    )


def _seq2seq_sizes(shape: Shape, dropout: float) -> dict:
    return {
        "vocab_size": shape.vocab_size,
        "d_model": shape.hidden_size,
        "encoder_layers": shape.num_layers,
        "encoder_attention_heads": shape.num_heads,
        "encoder_ffn_dim": shape.intermediate_size,
        "decoder_layers": 1,
        "decoder_attention_heads": shape.num_heads,
        "max_encoder_position_embeddings": shape.length,
        "attention_window": shape.attention_window,
        "dropout": dropout,
        "attention_dropout": dropout,
    }


def _roberta_config(shape: Shape, dropout: float) -> RobertaConfig:
    return RobertaConfig(
        **_common(shape, dropout),
        max_position_embeddings=shape.length + 2,
        attn_implementation="sdpa",
    )


def _modernbert_config(shape: Shape, dropout: float) -> ModernBertConfig:
    return ModernBertConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        # Its feed-forward layer is gated: two thirds of the width have as many parameters.
        intermediate_size=shape.intermediate_size * 2 // 3,
        max_position_embeddings=max(8192, shape.length),
        attention_dropout=dropout,
        mlp_dropout=dropout,
        embedding_dropout=dropout,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        cls_token_id=0,
        sep_token_id=2,
        attn_implementation="sdpa",
    )


def build_model(name: str, shape: Shape, dropout: float) -> nn.Module:
    """An encoder with random weights."""
    if name == OURS:
        return AdaptiveSparseModel(adaptive_sparse_config(shape, dropout), add_pooling_layer=False)
    if name == LONGFORMER:
        return LongformerModel(longformer_config(shape, dropout), add_pooling_layer=False)
    if name == BIG_BIRD:
        return BigBirdModel(_bigbird_config(shape, dropout), add_pooling_layer=False)
    if name == OURS_BIG_BIRD:
        config = AdaptiveSparseConfig(
            **_common(shape, dropout),
            max_position_embeddings=shape.length + 2,
            attention_pattern="big_bird",
        )
        return AdaptiveSparseModel(config, add_pooling_layer=False)
    if name == LED:
        return LEDEncoder(LEDConfig(**_seq2seq_sizes(shape, dropout)))
    if name == OURS_LED:
        sizes = _seq2seq_sizes(shape, dropout)
        return AdaptiveSparseSeq2SeqEncoder(
            AdaptiveSparseSeq2SeqConfig(**sizes, separate_global_projections=True)
        )
    if name == ROBERTA:
        return RobertaModel(_roberta_config(shape, dropout), add_pooling_layer=False)
    return ModernBertModel(_modernbert_config(shape, dropout))


def model_inputs(name: str, shape: Shape, batch_size: int, device: torch.device) -> dict:
    """Random token ids; the models that have global tokens get the first one."""
    generator = torch.Generator().manual_seed(0)
    size = (batch_size, shape.length)
    input_ids = torch.randint(5, shape.vocab_size, size, generator=generator).to(device)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if name in (OURS, LONGFORMER, OURS_LED, LED):
        inputs["global_attention_mask"] = torch.zeros_like(input_ids)
        inputs["global_attention_mask"][:, 0] = 1
    return inputs


def check_models_agree(shape: Shape, scratch: Path, device: torch.device) -> float:
    """Convert a random Longformer; raise unless both give the same output. Returns the
    difference."""
    source, target = scratch / "source", scratch / "converted"
    theirs = build_model(LONGFORMER, shape, dropout=0.0).to(device).eval()
    theirs.save_pretrained(source)
    convert_checkpoint(source, target)
    ours = AdaptiveSparseModel.from_pretrained(target, add_pooling_layer=False).to(device).eval()
    inputs = model_inputs(OURS, shape, 1, device)
    with torch.no_grad():
        expected = theirs(**inputs).last_hidden_state
        difference = (ours(**inputs).last_hidden_state - expected).abs().max().item()
    _require_small(difference, expected.abs().max().item())
    return difference


def _require_small(difference: float, largest: float) -> None:
    if not difference <= 2e-5 * max(1.0, largest):
        raise RuntimeError(
            f"outputs differ from Longformer's by {difference:.2e}: there is nothing to time"
        )


def build_layer(
    name: str, shape: Shape, dropout: float, device: torch.device
) -> tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    """An attention layer with all projections, and how to call it on [1, length, hidden_size].

    The contestants that have global tokens get one, the first.
    """
    output = nn.Linear(shape.hidden_size, shape.hidden_size)
    if name == OURS:
        layer = AdaptiveSparseAttention(adaptive_sparse_config(shape, dropout), 0).to(device)
        is_global = torch.zeros(1, shape.length, dtype=torch.bool, device=device)
        is_global[:, 0] = True
        return layer, lambda hidden: layer(hidden, None, is_global)[0]
    if name == LONGFORMER:
        config = longformer_config(shape, dropout)
        config.attention_window = [shape.attention_window]
        layer = nn.ModuleList([LongformerSelfAttention(config, 0), output]).to(device)
        mask = torch.zeros(1, shape.length, device=device)
        mask[:, 0] = 10000.0
        where = {
            "attention_mask": mask,
            "is_index_masked": mask < 0,
            "is_index_global_attn": mask > 0,
            "is_global_attn": True,
        }
        return layer, lambda hidden: layer[1](layer[0](hidden, **where)[0])
    if name == BIG_BIRD:
        layer = nn.ModuleList(
            [BigBirdBlockSparseAttention(_bigbird_config(shape, dropout), seed=0), output]
        ).to(device)
        blocked, band, from_mask, to_mask = BigBirdModel.create_masks_for_block_sparse_attn(
            torch.ones(1, shape.length, device=device), 64
        )
        where = {
            "band_mask": band,
            "from_mask": from_mask,
            "to_mask": to_mask,
            "from_blocked_mask": blocked,
            "to_blocked_mask": blocked,
        }
        return layer, lambda hidden: layer[1](layer[0](hidden, **where)[0])
    if name == ROBERTA:
        layer = nn.ModuleList(
            [RobertaSelfAttention(_roberta_config(shape, dropout), layer_idx=0), output]
        ).to(device)
        return layer, lambda hidden: layer[1](layer[0](hidden)[0])
    layer = ModernBertAttention(_modernbert_config(shape, dropout), layer_idx=1).to(device)
    angles = torch.zeros(1, shape.length, shape.hidden_size // shape.num_heads, device=device)
    index = torch.arange(shape.length, device=device)
    near = ((index[:, None] - index).abs() <= 64)[None, None]  # [1, 1, length, length]
    rotary = (angles.cos(), angles.sin())
    return layer, lambda hidden: layer(hidden, rotary, near)[0]


def check_layers_agree(shape: Shape, device: torch.device) -> float:
    """Copy Longformer's layer into ours; raise unless output and input gradient are the same."""
    theirs, call_theirs = build_layer(LONGFORMER, shape, 0.0, device)
    ours, call_ours = build_layer(OURS, shape, 0.0, device)
    projections, output = theirs
    weights = dict(projections.state_dict())
    weights |= {f"output.{name}": tensor for name, tensor in output.state_dict().items()}
    ours.load_state_dict(weights)
    hidden = torch.randn(
        1, shape.length, shape.hidden_size, generator=torch.Generator().manual_seed(1)
    ).to(device)
    gradients, outputs = [], []
    for call in (call_theirs, call_ours):
        leaf = hidden.clone().requires_grad_()
        out = call(leaf)
        gradients += torch.autograd.grad(out, leaf, hidden)
        outputs.append(out.detach())
    differences = []
    for expected, actual in (outputs, gradients):
        difference = (actual - expected).abs().max().item()
        _require_small(difference, expected.abs().max().item())
        differences.append(difference)
    return max(differences)
