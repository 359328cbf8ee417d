"""What several test files share: a small random model, and transformers' with the same weights."""

import pytest

from minichat.model import Config, Mistral

SHAPE = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    sliding_window=8,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    initializer_range=0.3,  # large, so that attention is far from uniform
)


def make(seed=0, **changes) -> Mistral:
    model = Mistral(Config(**{**SHAPE, **changes}))
    model.init_weights(seed)
    return model.eval()


def theirs(model: Mistral, attention: str = "eager"):
    """transformers' model with the same weights in the same dtype."""
    transformers = pytest.importorskip("transformers")
    raw = model.config.to_dict(model.dtype)
    kind = raw.pop("architectures")[0]
    raw.pop("model_type")
    config = getattr(transformers, kind.replace("ForCausalLM", "Config"))(**raw)
    other = getattr(transformers, kind)._from_config(config, attn_implementation=attention, dtype=model.dtype).eval()
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return other
