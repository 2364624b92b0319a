"""A scoring program that needs no vLLM: plain transformers read the export as the serving engine would."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def plain_engine(tmp_path: Path, ends: list[int] | None = None) -> list[str]:
    """Plain transformers stand for vLLM on a GPU, where the type "auto" of float32 weights is bfloat16. It ends answers
    with `ends`, or with what the export lists."""
    path = tmp_path / "gpu_engine.py"
    path.write_text(
        """
import json, sys
import torch
from transformers import AutoModelForCausalLM
from services.inference.engines.score import settings_for

request = json.load(sys.stdin)
dtype = {"auto": torch.bfloat16, "float32": torch.float32}[settings_for(request).dtype]
model = AutoModelForCausalLM.from_pretrained(request["export"], dtype=dtype).eval()
model.generation_config.eos_token_id = ENDS or model.generation_config.eos_token_id
log_probs, answers = [], []
for row in request["rows"]:
    with torch.no_grad():
        table = torch.log_softmax(model(torch.tensor([row])).logits[0, :-1].float(), dim=-1)
    log_probs.append([None, *table.gather(1, torch.tensor(row)[1:, None]).squeeze(1).tolist()])
for question in request["questions"]:
    asked = torch.tensor([question["ids"]])
    said = model.generate(asked, max_new_tokens=question["tokens_max"], do_sample=False, pad_token_id=0)
    ids = said[0, asked.shape[1]:].tolist()
    answers.append({"ids": ids, "stopped": len(ids) < question["tokens_max"]})
print(json.dumps({"log_probs": log_probs, "answers": answers}))
""".replace("ENDS", repr(ends))
    )
    return ["env", f"PYTHONPATH={ROOT}:{ROOT / 'gen'}", sys.executable, str(path)]
