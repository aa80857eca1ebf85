"""Split a model over three devices, inside its layers, and get the very tokens that transformers gives.

Run: python examples/same_tokens.py
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from splitray import SplitModel
from splitray.runtime.launch import SHIPPED  # the folder of the small model that comes with splitray

PROMPT = "The module os provides"


def main() -> None:
    """Generate twice, whole and split, and compare."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    inputs = tokenizer(PROMPT, return_tensors="pt")

    whole = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    expected = whole.generate(**inputs, max_new_tokens=24, do_sample=False)

    # `local` devices are threads of this process; `process` and `ray` run the same code in processes and actors
    with SplitModel.from_pretrained(SHIPPED, devices=3, planner="even", runtime="local") as split:
        got = split.generate(**inputs, max_new_tokens=24, do_sample=False)
        held = split.engine.stats()

    for device, memory in held.items():
        print(f"{device} held {memory['weight_bytes'] / 1e6:.1f} MB of weights")
    print(tokenizer.decode(got[0], skip_special_tokens=True))
    same = torch.equal(got, expected)
    print(f"equal to transformers: {same}")
    assert same


if __name__ == "__main__":
    main()
