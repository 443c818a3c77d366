"""What a process makes of a folder of tests/compat: by the installed hfgpt, or knowing hfgpt from the folder alone."""

import json
import sys
from pathlib import Path


class NoHFGPT:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hfgpt":
            raise ImportError(name)


folder, answer, is_own_code = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "its own code"
if is_own_code:
    sys.meta_path.insert(0, NoHFGPT())
else:
    import hfgpt  # noqa: F401 - lets AutoModel know the architecture

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

torch.set_num_threads(1)
expected = load_file(folder / "expected.safetensors")
model = AutoModelForCausalLM.from_pretrained(folder / "model", trust_remote_code=is_own_code)
tokenizer = AutoTokenizer.from_pretrained(folder / "model", trust_remote_code=is_own_code)
input_ids, greedy_ids = expected["input_ids"], expected["greedy_ids"]
prompt = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
found = {f"weights.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
with torch.no_grad():
    found["logits"] = model(greedy_ids).logits
for use_cache in (True, False):
    found[f"greedy_ids, use_cache={use_cache}"] = model.generate(
        **prompt, max_length=greedy_ids.shape[1], do_sample=False, use_cache=use_cache
    )
said = {
    "module": type(model).__module__,
    "ids": tokenizer(tokenizer.decode(input_ids[0])).input_ids,
    "text": tokenizer.decode(greedy_ids[0]),
}
save_file(found, answer, metadata={"said": json.dumps(said)})
