"""Run a model you already hold under a plan of your own, and read what it ran.

python examples/own_model.py
"""

import torch
from transformers import AutoModelForCausalLM, GPT2Config

import quicksilver
from quicksilver import rules

torch.manual_seed(0)
hf_model = AutoModelForCausalLM.from_config(
    GPT2Config(n_layer=6, n_embd=192, n_head=6, vocab_size=1000, bos_token_id=0, eos_token_id=0)
).eval()

halting = rules.HaltingConfig(rules.RelativeDriftRule(1.0), min_layer=0.5, protect_first=4)
plan = quicksilver.Plan("mine", halting, rules.KVConfig(rules.PropagateFill()))
model = quicksilver.accelerate(hf_model, plan)  # the weights are shared, not copied

prompt = torch.randint(0, 1000, (1, 32))
output = model.generate(prompt, max_new_tokens=16, do_sample=False, pad_token_id=0)
print(output[0, 32:].tolist())
print(model.stats.summary())
