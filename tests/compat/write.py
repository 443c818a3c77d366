"""Write `tests/compat/VERSION`: a tiny model as this hfgpt saves it, and what it says; later ones are held against it.

From the root, on what is about to be released:

    rm -r tests/compat/VERSION; python tests/compat/write.py

Once a version is released its folder is never written again: it is what users have.
"""

import sys
from itertools import count
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from hfgpt import HFGPTConfig, HFGPTForCausalLM, __version__
from hfgpt.data.tokenizer import train_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. A lazy dog does not jump; the fox, quick and brown, does. " * 4
PROMPT = "The quick brown fox"
NEW_TOKENS = 24


def main() -> None:
    """Write the folder.

    Raises:
        FileExistsError: it is there already.
    """
    folder = Path(__file__).parent / __version__
    folder.mkdir()
    tokenizer = train_tokenizer([TEXT], vocab_size=300, model_max_length=64)
    input_ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    model, greedy_ids, logits = next(found for seed in count() if (found := draw_model(seed, input_ids)) is not None)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    expected = {"input_ids": input_ids, "greedy_ids": greedy_ids, "logits": logits}
    written_by = {"hfgpt": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
    save_file(expected, folder / "expected.safetensors", metadata=written_by)
    sys.stdout.write(f"{folder}: {tokenizer.decode(greedy_ids[0])!r}\n")


@torch.no_grad()
def draw_model(seed: int, ids: torch.Tensor) -> tuple[HFGPTForCausalLM, torch.Tensor, torch.Tensor] | None:
    """A model, what it writes greedily, and the logits of that; None if its text says little.

    That is if it repeats itself, or if two next tokens are nearly equally likely. The text is made of whole sequences
    and argmax: neither a cache nor `generate` has a say in what is expected of them.
    """
    shape = {"vocab_size": 300, "n_positions": 64, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = HFGPTForCausalLM(HFGPTConfig(**shape, bos_token_id=0, eos_token_id=0)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():  # zeros and ones would hide what is swapped
        is_gain = "norm" in name and name.endswith("weight")
        std = 1.5 if "positions" in name else 0.5  # with weaker ones the text repeats itself
        parameter.normal_(mean=float(is_gain), std=std, generator=generator)
    length = ids.shape[1]
    for _ in range(NEW_TOKENS):
        next_V = model(ids, use_cache=False).logits[0, -1]
        first, second = next_V.topk(2)[0].tolist()
        if first - second < 1e-3:
            return None
        ids = torch.cat([ids, next_V.argmax()[None, None]], dim=-1)
    new = ids[0, length:].tolist()
    if len({*new}) < NEW_TOKENS // 3 or model.config.eos_token_id in new:
        return None
    return model, ids, model(ids, use_cache=False).logits


if __name__ == "__main__":
    main()
