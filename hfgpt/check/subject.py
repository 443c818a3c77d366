"""What is checked: a class of models that can be built small, and where it came from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hfgpt.check.small import changed_config, dropout_fields, size_of, small_values

MAX_PARAMETERS = 300_000_000
"""Above it a model that cannot be made small is refused: several copies of it must fit into 4 GB."""


@dataclass(frozen=True)
class Subject:
    """A causal language model to be checked.

    Attributes:
        what: what the user named.
        model_class: a subclass of transformers' `PreTrainedModel` with a language model's head.
        config: of the small models that `make` builds.
        is_small: whether it is smaller than what was named; if not, everything is tried at full size.
        folder: where its weights lie, if it came from a folder.
        auto_model: whether `AutoModelForCausalLM` knows the class, by its `model_type` or by the code beside weights.
        tokenizer: of the folder, if it has one.
        trust_remote_code: whether code that lies beside the weights may be run.
    """

    what: str
    model_class: Any
    config: PreTrainedConfig
    is_small: bool = True
    folder: Path | None = None
    auto_model: bool = False
    tokenizer: Any = None
    trust_remote_code: bool = False

    @property
    def vocab_size(self) -> int:
        """Number of token ids of the small model."""
        return self.config.get_text_config().vocab_size

    @property
    def positions(self) -> int:
        """Longest sequence of the small model in tokens; 64 if the config does not say."""
        return size_of(self.config, "max_position_embeddings", 64)

    @property
    def no_dropout(self) -> dict[str, Any]:
        """Changes to the config that leave training without chance."""
        return dict.fromkeys(dropout_fields(self.config), 0.0)

    def make(
        self, seed: int = 0, *, attention: str | None = None, dtype: torch.dtype | None = None, **changes: Any
    ) -> Any:
        """Build a small model in eval mode, every parameter drawn: biases and gains too, so that none is unseen.

        Args:
            seed: of the parameters.
            attention: an attention implementation; None is the class's own choice.
            dtype: of the parameters; None is fp32. They are drawn in fp32 whatever it is.
            **changes: to the config.
        """
        given = {} if attention is None else {"attn_implementation": attention}
        config = changed_config(self.config, changes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.model_class._from_config(config, dtype=torch.float32, **given)
        draw_parameters(model, seed)
        return model.to(dtype).eval() if dtype is not None else model.eval()

    def ids(self, batch: int, length: int, seed: int = 0) -> Tensor:
        """Random token ids, (B, T): none is 0, which pads here."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(1, self.vocab_size, (batch, length), generator=generator)

    def load(self, folder: Path, **kwargs: Any) -> Any:
        """Load a saved model as this class, in eval mode unless the loading info is asked for."""
        loaded = self.model_class.from_pretrained(folder, **kwargs)
        return loaded if isinstance(loaded, tuple) else loaded.eval()


def draw_parameters(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter: with zeros and ones, swapped norms or biases would go unseen.

    Matrices get the scale that keeps activations near one; vectors, which may be gains around one or around zero, or
    biases, are moved from where the class put them.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * min(parameter.shape[-2:]) ** -0.5)
            else:
                parameter.add_(0.1 * noise)


def shrink(model_class: Any, config: PreTrainedConfig) -> tuple[PreTrainedConfig, bool]:
    """A small config of which the class can be built; the config itself if there is none, and whether it is small.

    Raises:
        ValueError: it cannot be made small, and is too large to be tried as it is.
    """
    changes = small_values(config)
    try:
        small = changed_config(config, changes)
        model_class._from_config(small, dtype=torch.float32)
        return small, True
    except (ValueError, TypeError, RuntimeError, AssertionError, KeyError, IndexError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
    config = changed_config(config, {name: value for name, value in changes.items() if name.endswith("token_id")})
    with torch.device("meta"):
        parameters = model_class._from_config(config).num_parameters()
    if parameters > MAX_PARAMETERS:
        raise ValueError(
            f"{model_class.__name__} cannot be built small ({reason}), and has {parameters:,} parameters as it is. "
            "Name a folder whose config.json describes a small one."
        )
    return config, False
